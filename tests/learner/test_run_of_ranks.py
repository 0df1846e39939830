"""`ale train` with a learner of two processes, for real: killed in the middle, and resumed with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from ale.testing.processes import ended, processes_with

CONFIG = """
name = "a"
[model]
path = "{model}"
[tasks]
heldout = 2
families = 0
[warm_start]
steps = 2
demonstrations = 4
batch = 3
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
updates = 3
checkpoint_every = 1
ranks = 2
"""
DEADLINE_S = 600.0


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_run_with_two_ranks_is_killed_and_goes_on_with_one(tmp_path: Path, nano_path: Path) -> None:
    mark = uuid.uuid4().hex
    (tmp_path / "small.toml").write_text(CONFIG.format(model=nano_path))

    def start(*args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "from ale.cli import main; main()", "train", *args],
            cwd=tmp_path,
            env=os.environ | {"ALE_TEST_RUN": mark, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines() -> list[dict[str, float]]:
        path = tmp_path / "runs" / "a" / "metrics.jsonl"
        said = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, said) if "update" in line]

    process, deadline = start("small.toml"), time.monotonic() + DEADLINE_S
    while not lines() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert lines(), process.communicate()
    descriptors = [os.pidfd_open(pid) for pid in processes_with(mark)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    assert ended(descriptors) == len(descriptors) >= 3

    process = start("runs/a", "--resume", "--set", "learner.ranks=1")  # one goes on from what two saved
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    seen = lines()
    assert [line["update"] for line in seen] == [1, 2, 3]
    assert all(line["truth_max"] < 1e-3 for line in seen)
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert (summary["updates"], summary["lost_samples"]) == (3, 0)
    assert (tmp_path / "runs" / "a" / "checkpoints" / "final" / "model.safetensors").is_file()
    assert not processes_with(mark)
