import json
import math
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import ale
from ale.config import LearnerConfig, PolicyConfig, RolloutConfig, RunConfig
from ale.data.events import Began, Recorded, Resumed, Updated
from ale.data.journal import FORMAT
from ale.data.run_folder import RunFolder, versions
from ale.errors import ConfigError, RunFolderError
from ale.messages import Chunk, StepMetrics, ToolResult, Trajectory
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


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.record(update=1)
        for how in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(RunFolderError, match=rf"in use by a live process \(pid {os.getpid()}\)"):
                RunFolder(config(tmp_path), **how)
        assert lines(folder.path / "metrics.jsonl") == [{"update": 1}]
    RunFolder(config(tmp_path), resume=True).__exit__(None, None, None)


def test_what_the_journal_does_not_vouch_for_is_cut_off_and_the_rest_goes_on(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.record(update=1)
        folder.keep(trajectory(-0.5), update=1)
        folder.journal.write(Recorded(update=1, sizes=folder.sizes))
        folder.record(update=2)
        folder.keep(trajectory(-0.5), update=2)
    with (tmp_path / "a" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"upda')
    with RunFolder(config(tmp_path), resume=True) as folder:
        assert folder.books.recorded == 1
        folder.record(update=2, again=True)
    assert lines(tmp_path / "a" / "metrics.jsonl") == [{"update": 1}, {"update": 2, "again": True}]
    assert [line["update"] for line in lines(tmp_path / "a" / "trajectories.jsonl")] == [1]


def test_a_file_that_lost_lines_is_named(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.record(update=1)
        folder.journal.write(Recorded(update=1, sizes=folder.sizes))
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl is shorter than the journal says: 0 bytes instead of 13"):
        RunFolder(config(tmp_path), resume=True)


def test_another_configuration_is_refused_by_the_names_of_its_fields(tmp_path: Path) -> None:
    RunFolder(config(tmp_path)).__exit__(None, None, None)
    other = config(tmp_path, seed=3, rollout=RolloutConfig(max_lag=0))
    with pytest.raises(RunFolderError) as raised:
        RunFolder(other, resume=True)
    assert "seed (was 0, is 3), rollout.max_lag (was 1, is 0)" in str(raised.value)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["seed"] == 0


def test_a_run_may_be_given_more_updates_and_that_is_recorded(tmp_path: Path) -> None:
    RunFolder(config(tmp_path)).__exit__(None, None, None)
    more = config(tmp_path, learner=LearnerConfig(updates=200))
    with RunFolder(more, resume=True) as folder:
        began, event = folder.journal.read()
    assert began == Began(format=FORMAT, ale=ale.__version__)
    changed = {"learner.updates": "was 100, is 200"}
    assert event == Resumed(changed=changed, format=FORMAT, ale=ale.__version__)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["learner"]["updates"] == 200


def test_a_resumed_run_may_find_its_servers_elsewhere_and_give_them_more_time(tmp_path: Path) -> None:
    there, here = (
        PolicyConfig(kind="server", urls=[url], turn_deadline_s=s) for url, s in (("http://a", 9), ("b", 99))
    )
    RunFolder(config(tmp_path, policy=there)).__exit__(None, None, None)
    with RunFolder(config(tmp_path, policy=here), resume=True) as folder:
        *_, resumed = folder.journal.read()
        assert isinstance(resumed, Resumed)
        assert set(resumed.changed) == {"policy.urls", "policy.turn_deadline_s"}


def test_updates_that_were_made_cannot_be_taken_back(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        metrics = StepMetrics(version=1, slot=1, loss=0.0, grad_norm=0.0, values={})
        folder.journal.write(Updated(number=1, groups=(), metrics=metrics, lag=0, wait_s=0.0, step_s=0.0))
    fewer = config(tmp_path, learner=LearnerConfig(updates=0))
    with pytest.raises(RunFolderError, match=r"learner.updates is 0, but .* has made 1 already"):
        RunFolder(fewer, resume=True)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run in .*Leave --resume out"):
        RunFolder(config(tmp_path), resume=True)
    with RunFolder(config(tmp_path)) as folder:
        (folder.path / "journal").unlink()
    with pytest.raises(RunFolderError, match="has no journal"):
        RunFolder(config(tmp_path), resume=True)


def test_tensorboard_reads_each_update_once(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboardX.proto.event_pb2")
    for life, numbers in ((0, (1, 2, 3)), (1, (2, 3))):
        with RunFolder(config(tmp_path), resume=life > 0) as folder:
            for number in numbers:
                folder.record(update=number, loss=float(number), ledger={"started": 2})
                if number == 1:
                    folder.journal.write(Recorded(update=1, sizes=folder.sizes))
    first, second = sorted((tmp_path / "a" / "tensorboard").iterdir(), key=lambda p: p.name.rsplit(".")[-1])
    seen = []
    for path in (first, second):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = loader.Event.FromString(data[at + 12 : at + 12 + length])
            if event.HasField("session_log"):  # a reader forgets what it saw from this step on
                seen = [entry for entry in seen if entry[0] < event.step]
            seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    assert seen == [(n, tag, v) for n in (1, 2, 3) for tag, v in (("loss", float(n)), ("ledger/started", 2.0))]


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path)) as folder:
        folder.record(update=1)
        folder.export("4").mkdir(parents=True)
    with RunFolder(config(tmp_path), overwrite=True) as folder:
        assert not folder.export("4").exists()
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
