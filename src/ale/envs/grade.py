"""Scoring what an agent left behind: the task's tests, in a fresh sandbox, on a snapshot of the workspace.

The agent's processes died with its own sandbox, the tests were never in it, and the reward is written to a directory
that the agent never saw. Tests that crash, hang or write no number are an error of the evaluator, not a reward of 0.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import tempfile
from pathlib import Path

from ale.errors import EvaluatorError, SandboxError
from ale.messages import Score
from ale.sandbox import Command, Limits, Mount, SandboxEngine, SandboxSpec, Snapshot
from ale.sandbox.launcher import remove_tree
from ale.task import REWARD_FILE, TESTS_DIR, Task
from ale.waiting import named

_LOGS, _REWARD_NAME = REWARD_FILE.rsplit("/", 1)
_MAX_REWARD_BYTES = 64


async def grade(engine: SandboxEngine, task: Task, snapshot: Snapshot, *, label: str = "") -> Score:
    """Runs `tests/test.sh` and reads the reward. Raises `EvaluatorError` and `SandboxError`."""
    scratch = Path(tempfile.mkdtemp(prefix="grade-", dir=engine.scratch))
    try:
        tests, logs = _lay_out(scratch, task)
        spec = SandboxSpec(
            base=snapshot,
            limits=Limits(memory_mb=task.memory_mb),
            mounts=(Mount(str(tests), TESTS_DIR), Mount(str(logs), _LOGS, writable=True)),
            label=label,
        )
        limit_s = task.verifier_timeout_s
        with named(f"the end of the tests of {task.id}", release="their end, or their time-out", deadline_s=limit_s):
            completed = await engine.run(
                spec, Command(shell=f'exec bash "$ALE_ROOT{TESTS_DIR}/test.sh"', timeout_s=limit_s)
            )
        output = (completed.text() + completed.text("stderr"))[-2000:]
        if completed.timed_out:
            raise EvaluatorError(f"the tests of {task.id} ran longer than {task.verifier_timeout_s:g} s")
        if completed.signal is not None:
            raise EvaluatorError(f"the tests of {task.id} were killed by signal {completed.signal}: {output}")
        return Score(reward=_read_reward(logs / _REWARD_NAME, task.id, output), output=output)
    except OSError as error:
        raise SandboxError(f"{task.id} cannot be graded: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # else it goes with the engine
            remove_tree(scratch)


def _lay_out(scratch: Path, task: Task) -> tuple[Path, Path]:
    """The tests, and an empty directory that they may write to. A few small files: not worth a thread."""
    scratch.chmod(0o755)
    tests, logs = scratch / "tests", scratch / "logs"
    logs.mkdir()
    logs.chmod(0o777)  # the sandbox's user, whoever that is; the way to it is open to nobody else
    for file in task.tests:
        path = tests / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
        path.chmod(file.mode)
    return tests, logs


def _read_reward(path: Path, task: str, output: str) -> float:
    """Opens what the tests wrote without following a link: code of the agent may have run beside them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise EvaluatorError(f"the tests of {task} wrote no reward to {REWARD_FILE}: {output or error}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a directory, a pipe
            raise EvaluatorError(f"the reward of {task} is no regular file")
        text = os.read(fd, _MAX_REWARD_BYTES).decode("utf-8", "replace").strip()
    finally:
        os.close(fd)
    try:
        reward = float(text)
    except ValueError:
        raise EvaluatorError(f"the tests of {task} wrote {text!r} to {REWARD_FILE}, which is no number") from None
    if not math.isfinite(reward):
        raise EvaluatorError(f"the tests of {task} wrote {text!r} to {REWARD_FILE}, which is not finite")
    return reward
