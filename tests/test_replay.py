"""`ale train --record`, killed and resumed, then `ale replay` and `ale diff`: for real, sandboxes and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ale.data.events import Recorded
from ale.data.journal import read_journal
from ale.data.recording import read_recording

CONFIG = """
name = "a"
[model]
path = "{model}"
[tasks]
heldout = 1
families = 0
[warm_start]
steps = 3
demonstrations = 2
batch = 2
[agent]
max_turns = 3
max_turn_tokens = 4
max_context_tokens = 400
[rollout]
group_size = 2
groups_per_step = 2
max_lag = 2
concurrency = 8
[algorithm]
baseline = "signed"
[learner]
updates = 6
checkpoint_every = 2
"""
DEADLINE_S = 600.0


def start(cwd: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from ale.cli import main; main()", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ale(cwd: Path, *args: str, code: int = 0) -> str:
    process = start(cwd, *args)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, (out, err)
    return out + err


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_recorded_run_that_was_killed_and_resumed_replays_to_the_same_losses(tmp_path: Path, nano_path: Path) -> None:
    (tmp_path / "small.toml").write_text(CONFIG.format(model=nano_path))
    run = tmp_path / "runs" / "a"
    process = start(tmp_path, "train", "small.toml", "--record")
    deadline = time.monotonic() + DEADLINE_S
    while not (run / "journal").exists() or sum(isinstance(e, Recorded) for e in read_journal(run / "journal")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    ale(tmp_path, "train", "runs/a", "--resume")

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = json.loads(ale(tmp_path, "replay", "a", "--json"))
    assert found["diverged"] is None
    assert (found["lives"], found["updates"]) == (2, 6)
    assert found["loss_apart"] <= 1e-6
    assert found["rollouts"] >= 6 * 4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert sum(entry.kind == "turn" for entry in read_recording(run / "recording")) >= found["rollouts"]
    assert "neither did what the other did not" in ale(tmp_path, "diff", "a", "runs/a")

    # Another seed: the same tasks, and the first token that differs.
    ale(tmp_path, "train", "small.toml", "--name", "b", "--seed", "1")
    said = ale(tmp_path, "diff", "a", "b", code=1)
    assert "seed: 0, and 1" in said
    assert "the first difference is at" in said
    assert "was not recorded" in ale(tmp_path, "replay", "b", code=2)
