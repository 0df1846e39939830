import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ale.config import RunConfig
from ale.data.run_folder import RunFolder, versions
from ale.errors import ConfigError
from ale.messages import Chunk, ToolResult, Trajectory
from ale.wire import Array


def config(tmp_path: Path, **more: Any) -> RunConfig:
    return RunConfig(name="a", runs_dir=str(tmp_path), **more)


def trajectory(*logp: float) -> Trajectory:
    n = len(logp)
    return Trajectory(
        id="g/0",
        group="g",
        task="t-1",
        family="copy",
        level=1,
        tokens_T=Array.of(range(n + 2), "int32"),
        chunks=(Chunk(2, n + 2, "call", error=True),),
        logp_A=Array.of(logp, "float32"),
        logp_sampled_A=Array.of(logp, "float32"),
        version_A=Array.of([4] * n, "int32"),
        results=(ToolResult("ls\n", "a\ud7ff\0\n", 0),),
        reward=1.0,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_folder_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path, seed=1)) as folder:
        folder.record(update=1)
    with pytest.raises(ConfigError, match=r"exists and is not empty.*--overwrite"):
        RunFolder(config(tmp_path, seed=2))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["seed"] == 1
    assert lines(tmp_path / "a" / "metrics.jsonl") == [{"update": 1}]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with RunFolder(config(tmp_path)) as folder:
        assert (folder.path / "config.json").is_file()


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.record(update=1)
        (folder.checkpoint("4")).mkdir()
    with RunFolder(config(tmp_path), overwrite=True) as folder:
        assert not folder.checkpoint("4").exists()
    assert lines(tmp_path / "a" / "metrics.jsonl") == []
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(ConfigError, match="something else than a run"):
        RunFolder(config(tmp_path), overwrite=True)
    assert (tmp_path / "a" / "metrics.jsonl").exists()


def test_a_file_in_the_way_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("here first")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"runs_dir: .* cannot be written"):
            RunFolder(config(tmp_path), overwrite=overwrite)
    assert (tmp_path / "a").read_text() == "here first"


def test_every_line_is_json_and_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.record(update=1, loss=math.nan, grad_norm=math.inf, ledger={"started": 3})
        folder.keep(trajectory(-0.5, -1.25), update=1)
        folder.keep(trajectory(-0.5), evaluation="heldout_before")
        metrics, (first, second) = lines(folder.path / "metrics.jsonl"), lines(folder.path / "trajectories.jsonl")
    assert metrics == [{"update": 1, "loss": None, "grad_norm": None, "ledger": {"started": 3}}]
    assert first["tokens_T"] == [0, 1, 2, 3]
    assert (first["logp_A"], first["version_A"], first["update"]) == ([-0.5, -1.25], [4, 4], 1)
    assert first["chunks"] == [[2, 4, "call", True, True]]
    assert first["results"][0]["output"] == "a\ud7ff\0\n"
    assert (second["evaluation"], second["status"], second["reward"]) == ("heldout_before", "scored", 1.0)


def test_log_probabilities_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.keep(trajectory(-math.inf, math.nan, math.inf, -0.5))
        (line,) = lines(folder.path / "trajectories.jsonl")
    low, nothing, high, plain = line["logp_A"]
    assert (low < -1e29, nothing, high > 1e29, plain) == (True, None, True, -0.5)


def test_versions_are_told_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert versions().commit is None
    assert versions().torch.startswith("2.")
