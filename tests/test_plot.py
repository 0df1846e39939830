import sys
from pathlib import Path

import pytest

from ale.config import RunConfig
from ale.data.run_folder import RunFolder
from ale.data.run_log import RunLog
from ale.errors import UserError
from ale.plot import curve, plot, seconds, throughput


def run(tmp_path: Path, name: str, updates: int = 3) -> RunLog:
    with RunFolder(RunConfig(name=name, runs_dir=str(tmp_path))) as folder:
        folder.record(evaluation="heldout_before", success=0.25, ci95=(0.1, 0.5), n=8)
        for n in range(1, updates + 1):
            folder.record(
                update=n,
                success=n / 10,
                grad_norm=float("inf") if n == 2 else 1 / n,
                lag=float(n > 1),
                wait_s=1.0,
                step_s=2.0,
                sync_s=1.0,
                pi_old_s=0.5,
                update_s=1.0,
                action_tokens=80.0,
                ledger={"started": 10 * n + 5, "running": 5},
            )
        folder.record(evaluation="heldout_2", success=0.5, ci95=(0.3, 0.7), n=8)
        folder.record(evaluation="families_after", success=0.5, ci95=(0.3, 0.7), n=8)
    return RunLog.open(tmp_path / name)


def test_throughput_counts_ended_episodes_and_trained_tokens(tmp_path: Path) -> None:
    log = run(tmp_path, "a")
    assert seconds(log) == [4.0] * 3
    assert throughput(log) == ([9000.0] * 3, [20.0] * 3)


def test_a_value_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    x, y = curve(run(tmp_path, "a"), "grad_norm")
    assert x == [1, 2, 3]
    assert y == pytest.approx([1.0, float("nan"), 1 / 3], nan_ok=True)


def test_one_run_and_several_become_a_picture(tmp_path: Path) -> None:
    for count in (1, 2):
        out = tmp_path / f"{count}.png"
        plot([run(tmp_path / str(count), name) for name in "ab"[:count]], out)
        assert out.read_bytes().startswith(b"\x89PNG\r\n")
        assert out.stat().st_size > 10_000


def test_a_run_of_one_update_can_be_drawn(tmp_path: Path) -> None:
    plot([run(tmp_path, "a", updates=1)], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_a_run_without_updates_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/a has no update yet"):
        plot([run(tmp_path, "a", updates=0)], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'ale\[plot\]'"):
        plot([run(tmp_path, "a")], tmp_path / "a.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out: .*nowhere.* cannot be written"):
        plot([run(tmp_path, "a")], tmp_path / "nowhere" / "a.png")
