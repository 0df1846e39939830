"""`ale train --record`, killed and resumed, then `ale replay` and `ale diff`: for real, sandboxes and all."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ale.data.events import Recorded
from ale.data.journal import read_journal
from ale.data.recording import read_recording
from ale.testing.small_run import DEADLINE_S, SmallRun

CHANGES = {
    "tasks.heldout": 1,
    "warm_start.steps": 3,
    "agent.max_turns": 3,
    "agent.max_turn_tokens": 4,
    "rollout.max_lag": 2,
    "learner.updates": 6,
}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_recorded_run_that_was_killed_and_resumed_replays_to_the_same_losses(tmp_path: Path, nano_path: Path) -> None:
    small = SmallRun(tmp_path, nano_path, CHANGES)
    run = small.path
    process = small.start("train", "small.toml", "--record")
    deadline = time.monotonic() + DEADLINE_S
    while not (run / "journal").exists() or sum(isinstance(e, Recorded) for e in read_journal(run / "journal")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    small.ale("train", "runs/a", "--resume")

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = json.loads(small.ale("replay", "a", "--json")[0])
    assert found["diverged"] is None
    assert (found["lives"], found["updates"]) == (2, 6)
    assert found["loss_apart"] <= 1e-6
    assert found["rollouts"] >= 6 * 4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert sum(entry.kind == "turn" for entry in read_recording(run / "recording")) >= found["rollouts"]
    assert "neither did what the other did not" in small.ale("diff", "a", "runs/a")[0]

    # Another seed: the same tasks, and the first token that differs.
    small.ale("train", "small.toml", "--name", "b", "--seed", "1")
    said, _ = small.ale("diff", "a", "b", code=1)
    assert "seed: 0, and 1" in said
    assert "the first difference is at" in said
    assert "was not recorded" in small.ale("replay", "b", code=2)[1]
