"""`ale train` with a learner of two processes, for real: killed in the middle, and resumed with one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ale.testing.processes import ended, processes_with
from ale.testing.small_run import DEADLINE_S, SmallRun


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_run_with_two_ranks_is_killed_and_goes_on_with_one(tmp_path: Path, nano_path: Path) -> None:
    changes = {"warm_start.demonstrations": 4, "warm_start.batch": 3, "learner.updates": 3}
    run = SmallRun(tmp_path, nano_path, changes | {"learner.checkpoint_every": 1, "learner.ranks": 2})
    process, deadline = run.start("train", "small.toml"), time.monotonic() + DEADLINE_S
    while not run.lines() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert run.lines(), process.communicate()
    descriptors = [os.pidfd_open(pid) for pid in processes_with(run.mark)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    assert ended(descriptors) == len(descriptors) >= 3

    run.ale("train", "runs/a", "--resume", "--set", "learner.ranks=1")  # one goes on from what two saved
    seen = run.lines()
    assert [line["update"] for line in seen] == [1, 2, 3]
    assert all(line["truth_max"] < 1e-3 for line in seen)
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["updates"], summary["lost_samples"]) == (3, 0)
    assert (run.path / "checkpoints" / "final" / "model.safetensors").is_file()
    assert not processes_with(run.mark)
