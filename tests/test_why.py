"""`ale why` on real runs, whose processes are stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from ale.testing.processes import processes_with

CONFIG = """
name = "a"
[model]
path = "{model}"
[tasks]
heldout = 2
families = 0
[warm_start]
steps = 2
demonstrations = 2
batch = 2
[agent]
max_turns = 2
max_turn_tokens = 3
max_context_tokens = 400
[rollout]
group_size = 2
groups_per_step = 2
concurrency = 8
[algorithm]
baseline = "signed"
[learner]
updates = {updates}
"""
DEADLINE_S = 280.0
MARK = uuid.uuid4().hex


def ale(cwd: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from ale.cli import main; main()", *args],
        cwd=cwd,
        env=os.environ | {"ALE_TEST_WHY": MARK, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(cwd: Path) -> list[dict[str, Any]]:
    path = cwd / "runs" / "a" / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [line for line in map(json.loads, whole) if "update" in line]


def wait_for_updates(cwd: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(lines(cwd)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker(name: str) -> int:
    (pid,) = (p for p in processes_with(MARK) if f"ale.{name}".encode() in Path(f"/proc/{p}/cmdline").read_bytes())
    return pid


@pytest.mark.full
def test_an_engine_that_is_killed_is_started_again_and_the_run_goes_on(tmp_path: Path, nano_path: Path) -> None:
    (tmp_path / "small.toml").write_text(CONFIG.format(model=nano_path, updates=6))
    process = ale(tmp_path, "train", "small.toml")
    wait_for_updates(tmp_path, process, 2)
    os.kill(worker("policy.engine_process"), signal.SIGKILL)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, (out, err)
    seen = lines(tmp_path)
    assert [line["update"] for line in seen] == list(range(1, 7))
    assert seen[-1]["engine_restarts"] == 1.0
    assert "policy_failure" not in seen[-1]["ledger"]["dropped"]
    summary = json.loads((tmp_path / "runs/a/summary.json").read_text())
    assert summary["lost_samples"] == 0
    for name in ("engine", "learner"):
        assert 0.0 <= seen[-1][f"{name}_busy"] <= 1.0
        assert seen[-1][f"{name}_memory_mb"] > 50
    trace = (tmp_path / "runs/a/timeline.json").read_text()
    rows = {e["args"]["name"] for e in json.loads(trace.rstrip(",\n") + "]") if e["ph"] == "M"}
    assert {"trainer/run", "process learner", "envs/0"} <= rows
    said, _ = ale(tmp_path, "why", "a").communicate(timeout=60)
    assert "ended" in said
    assert ": done" in said


@pytest.mark.full
def test_a_stopped_learner_is_named_live_ends_the_run_and_the_run_can_be_resumed(
    tmp_path: Path, nano_path: Path
) -> None:
    (tmp_path / "small.toml").write_text(CONFIG.format(model=nano_path, updates=4))
    quick = ("learner.step_deadline_s=20", "agent.episode_timeout_s=20", "watchdog.silence_s=1")
    process = ale(tmp_path, "train", "small.toml", *(word for field in quick for word in ("--set", field)))
    wait_for_updates(tmp_path, process, 2)
    os.kill(worker("learner.learner_process"), signal.SIGSTOP)
    deadline, said = time.monotonic() + 30, ""
    while "process learner (pid" not in said.partition("release")[0]:
        assert time.monotonic() < deadline, said
        said, _ = ale(tmp_path, "why", "a").communicate(timeout=60)
    assert "live, as of" in said
    assert "is stopped, by SIGSTOP" in said
    assert "trainer/run waits for" in said
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, (out, err)
    assert "process learner (pid" in err
    assert "is stopped, by SIGSTOP" in err
    assert "--resume goes on" in err
    said, _ = ale(tmp_path, "why", "a").communicate(timeout=60)
    assert "is stopped, by SIGSTOP" in said  # what it was, not what its end waited for
    out, err = ale(tmp_path, "train", "runs/a", "--resume", "--set", "learner.step_deadline_s=300").communicate(
        timeout=DEADLINE_S
    )
    assert [line["update"] for line in lines(tmp_path)] == [1, 2, 3, 4], err
