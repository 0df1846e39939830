"""A whole run as small as they get, for what is tested around it: ends, kills, resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "name": "a",
    "tasks.heldout": 2,
    "tasks.families": 0,
    "warm_start.steps": 2,
    "warm_start.demonstrations": 2,
    "warm_start.batch": 2,
    "agent.max_turns": 2,
    "agent.max_turn_tokens": 3,
    "agent.max_context_tokens": 400,
    "rollout.group_size": 2,
    "rollout.groups_per_step": 2,
    "rollout.concurrency": 8,
    "algorithm.baseline": "signed",
    "learner.checkpoint_every": 2,
}
DEADLINE_S = 600.0


def write_small(place: Path, model: Path, changes: Mapping[str, Any]) -> Path:
    """`small.toml` in `place`: `SETTINGS` with `changes`, such as `{"learner.updates": 3}`."""
    values = SETTINGS | {"model.path": str(model)} | dict(changes)
    path = place / "small.toml"
    path.write_text("".join(f"{field} = {json.dumps(value)}\n" for field, value in values.items()))
    return path


class SmallRun:
    """`small.toml` in a directory of its own, and the commands of `ale` there; `path` is the folder of its run.

    run = SmallRun(tmp_path, model, {"learner.updates": 3})
    process = run.start("train", "small.toml")

    `mark` is in the environment of all that it starts: `ale.testing.processes.processes_with(run.mark)`.
    """

    def __init__(self, place: Path, model: Path, changes: Mapping[str, Any]) -> None:
        self.place = place
        self.path = place / "runs" / "a"
        self.mark = uuid.uuid4().hex
        write_small(place, model, changes)

    def start(self, *args: str, wrap: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*wrap, sys.executable, "-m", "ale", *args],
            cwd=self.place,
            env=os.environ | {"ALE_TEST_RUN": self.mark, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ale(self, *args: str, code: int = 0) -> tuple[str, str]:
        """What a command said on stdout and stderr; it has to end with that code."""
        process = self.start(*args)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The whole lines of a file of the run so far that are about updates or their members."""
        path = self.path / name
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [line for line in map(json.loads, whole) if "update" in line]
