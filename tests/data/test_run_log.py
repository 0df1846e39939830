import json
from pathlib import Path
from typing import Any

import pytest

from ale.config import RolloutConfig, RunConfig
from ale.config_file import dump
from ale.data.run_folder import RunFolder
from ale.data.run_log import RunLog
from ale.errors import RunFolderError
from ale.messages import Chunk, ToolResult, Trajectory
from ale.wire import Array


def trajectory(id_: str, group: str, reward: float, **more: Any) -> Trajectory:
    values: dict[str, Any] = {
        "task": "t-1",
        "family": "copy",
        "level": 1,
        "tokens_T": Array.of(range(6), "int32"),
        "chunks": (Chunk(2, 4, "call"), Chunk(5, 6, "answer")),
        "logp_A": Array.of([-0.5, -1.0, -0.25], "float32"),
        "logp_sampled_A": Array.of([-0.5, -1.0, -0.25], "float32"),
        "version_A": Array.of([3, 3, 4], "int32"),
        "results": (ToolResult("ls", "a.txt", 0),),
    }
    return Trajectory(id=id_, group=group, reward=reward, **(values | more))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two updates, written as a run writes it."""
    config = RunConfig(name="a", runs_dir=str(tmp_path), seed=3, rollout=RolloutConfig(max_lag=2))
    with RunFolder(config) as folder:
        folder.record(evaluation="heldout_before", success=0.25, ci95=(0.1, 0.5), n=8)
        folder.keep(trajectory("heldout_before/t-9/0", "heldout_before", 0.0), evaluation="heldout_before")
        for number in (1, 2):
            folder.record(update=number, success=number / 4, lag=0.0)
            for member, reward in enumerate((1.0, 0.0)):
                folder.keep(trajectory(f"g{number}/{member}", f"g{number}", reward), update=number)
    return tmp_path / "a"


def test_what_a_run_wrote_is_read_back(run: Path) -> None:
    log = RunLog.open(run)
    assert (log.name, log.summary, log.notes) == ("a", None, [])
    assert [line["success"] for line in log.updates] == [0.25, 0.5]
    assert [line["evaluation"] for line in log.evaluations] == ["heldout_before"]
    entries = list(log.entries())
    assert [(e.id, e.update, e.evaluation, log.solved(e)) for e in entries] == [
        ("heldout_before/t-9/0", None, "heldout_before", False),
        ("g1/0", 1, None, True),
        ("g1/1", 1, None, False),
        ("g2/0", 2, None, True),
        ("g2/1", 2, None, False),
    ]
    assert entries[0].action_tokens == 3
    found, group = log.trajectory("g2/1")
    assert (found.logp_A, found.version_A, found.results[0].output) == ([-0.5, -1.0, -0.25], [3, 3, 4], "a.txt")
    assert [member.id for member in group] == ["g2/0", "g2/1"]


def test_only_what_differs_from_the_defaults_is_a_change(run: Path) -> None:
    log = RunLog.open(run)
    assert log.changes() == {"seed": 3, "rollout.max_lag": 2}
    assert log.setting("rollout.max_lag") == 2
    assert log.setting("algorithm.objective") == "ipa"


def test_a_folder_that_holds_the_defaults_has_no_changes(run: Path) -> None:
    (run / "config.json").write_bytes(dump(RunConfig(name="a", runs_dir=str(run.parent))))
    assert RunLog.open(run).changes() == {}


def test_a_setting_that_an_old_run_did_not_know_is_todays_default(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    del config["algorithm"]
    (run / "config.json").write_text(json.dumps(config | {"gone": {"by": 1}}))
    log = RunLog.open(run)
    assert log.setting("algorithm.objective") == "ipa"
    assert log.changes() == {"seed": 3, "rollout.max_lag": 2, "gone.by": 1}


def test_a_run_is_found_by_its_path_and_by_its_name(run: Path) -> None:
    assert RunLog.open(run).path == RunLog.open("a", run.parent).path == run


@pytest.mark.parametrize(
    ("name", "hint"),
    [("aa", "did you mean a?"), ("nothing-like-it", "there are: a."), ("elsewhere/aa", "did you mean a?")],
)
def test_an_unknown_run_is_answered_with_the_nearest_or_with_all(run: Path, name: str, hint: str) -> None:
    with pytest.raises(RunFolderError, match=f"There is no run {name}") as error:
        RunLog.open(name, run.parent)
    assert hint in str(error.value)


def test_without_any_run_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no runs either"):
        RunLog.open("a", tmp_path)


@pytest.mark.parametrize("file", ["metrics.jsonl", "trajectories.jsonl"])
@pytest.mark.parametrize("damage", [b'{"update": 1,\n', b"[]\n", b'\xff{"a": 1}\n', b"\n"])
def test_a_damaged_line_is_named(run: Path, file: str, damage: bytes) -> None:
    lines = (run / file).read_bytes().splitlines(keepends=True)
    (run / file).write_bytes(b"".join([lines[0], damage, *lines[1:]]))
    with pytest.raises(RunFolderError, match=rf"{file}, line 2, is damaged"):
        list(RunLog.open(run).entries())


@pytest.mark.parametrize("file", ["metrics.jsonl", "trajectories.jsonl"])
def test_a_last_line_without_its_end_is_left_out_with_a_note(run: Path, file: str) -> None:
    whole = (run / file).read_bytes()
    (run / file).write_bytes(whole[:-10])
    log = RunLog.open(run)
    assert len(list(log.entries())) == (4 if file == "trajectories.jsonl" else 5)
    assert len(log.updates) == (1 if file == "metrics.jsonl" else 2)
    (note,) = log.notes
    assert f"{file} ends within line" in note


def test_a_run_that_has_just_begun_has_no_lines(run: Path) -> None:
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        (run / name).unlink()
    log = RunLog.open(run)
    assert (log.updates, log.evaluations, list(log.entries())) == ([], [], [])


def test_a_damaged_configuration_is_named(run: Path) -> None:
    (run / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config\.json cannot be read"):
        RunLog.open(run)


def test_an_unknown_trajectory_is_answered_with_the_nearest(run: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no trajectory g2/7; did you mean g2/[01]\?"):
        RunLog.open(run).trajectory("g2/7")


def test_the_tokenizer_is_that_of_the_run(run: Path) -> None:
    assert RunLog.open(run).tokenizer() is None
    for home in ("checkpoints/final", "model"):
        (run / home).mkdir(parents=True)
        (run / home / "tokenizer.json").touch()
        assert RunLog.open(run).tokenizer() == run / home / "tokenizer.json"
