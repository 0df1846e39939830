"""`ale why` on real runs, whose processes are stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ale.testing.processes import processes_with
from ale.testing.small_run import DEADLINE_S, SmallRun


def wait_for_updates(run: SmallRun, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(run.lines()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker(run: SmallRun, name: str) -> int:
    (pid,) = (p for p in processes_with(run.mark) if f"ale.{name}".encode() in Path(f"/proc/{p}/cmdline").read_bytes())
    return pid


@pytest.mark.full
def test_an_engine_that_is_killed_is_started_again_and_the_run_goes_on(tmp_path: Path, nano_path: Path) -> None:
    run = SmallRun(tmp_path, nano_path, {"learner.updates": 6})
    process = run.start("train", "small.toml")
    wait_for_updates(run, process, 2)
    os.kill(worker(run, "policy.engine_process"), signal.SIGKILL)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, (out, err)
    seen = run.lines()
    assert [line["update"] for line in seen] == list(range(1, 7))
    assert seen[-1]["engine_restarts"] == 1.0
    assert "policy_failure" not in seen[-1]["ledger"]["dropped"]
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["lost_samples"] == 0
    for name in ("engine", "learner"):
        assert 0.0 <= seen[-1][f"{name}_busy"] <= 1.0
        assert seen[-1][f"{name}_memory_mb"] > 50
    trace = (run.path / "timeline.json").read_text()
    rows = {e["args"]["name"] for e in json.loads(trace.rstrip(",\n") + "]") if e["ph"] == "M"}
    assert {"trainer/run", "process learner", "envs/0"} <= rows
    said, _ = run.start("why", "a").communicate(timeout=60)
    assert "ended" in said
    assert ": done" in said


@pytest.mark.full
def test_a_stopped_learner_is_named_live_ends_the_run_and_the_run_can_be_resumed(
    tmp_path: Path, nano_path: Path
) -> None:
    run = SmallRun(tmp_path, nano_path, {"learner.updates": 4})
    quick = ("learner.step_deadline_s=20", "agent.episode_timeout_s=20", "watchdog.silence_s=1")
    process = run.start("train", "small.toml", *(word for field in quick for word in ("--set", field)))
    wait_for_updates(run, process, 2)
    os.kill(worker(run, "learner.learner_process"), signal.SIGSTOP)
    deadline, said = time.monotonic() + 30, ""
    while "process learner (pid" not in said.partition("release")[0]:
        assert time.monotonic() < deadline, said
        said, _ = run.start("why", "a").communicate(timeout=60)
    assert "live, as of" in said
    assert "is stopped, by SIGSTOP" in said
    assert "trainer/run waits for" in said
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, (out, err)
    assert "process learner (pid" in err
    assert "is stopped, by SIGSTOP" in err
    assert "--resume goes on" in err
    said, _ = run.start("why", "a").communicate(timeout=60)
    assert "is stopped, by SIGSTOP" in said  # what it was, not what its end waited for
    out, err = run.start("train", "runs/a", "--resume", "--set", "learner.step_deadline_s=300").communicate(
        timeout=DEADLINE_S
    )
    assert [line["update"] for line in run.lines()] == [1, 2, 3, 4], err
