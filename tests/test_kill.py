"""SIGKILL of `ale train` in the middle of its work: after the next start nothing of it is left."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from ale.sandbox import Command, SandboxSpec, open_engine
from ale.sandbox.state import PREFIX, default_parent
from ale.testing.processes import ended, processes_with
from ale.testing.small_run import SmallRun

CHANGES = {
    "tasks.heldout": 1,
    "warm_start.steps": 0,
    "agent.max_turns": 4,
    "agent.max_turn_tokens": 4,
    "rollout.group_size": 1,
    "rollout.groups_per_step": 4,
    "learner.updates": 100_000,
}
DEADLINE_S = 120


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def held_still_with_sandboxes(pid: int) -> Path:
    """Stops the run at a moment at which sandboxes are alive; returns its state directory."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        os.kill(pid, signal.SIGSTOP)
        for state in default_parent().glob(f"{PREFIX}{pid}-*"):
            if any((state / "boxes").iterdir()) and processes_with(f"{state}/tools/empty") - {pid}:
                return state
        os.kill(pid, signal.SIGCONT)
    raise AssertionError("the run had no sandbox in all this time")


@pytest.mark.full
def test_sigkill_of_a_run_leaves_nothing_behind_after_the_next_start(tmp_path: Path, nano_path: Path) -> None:
    small = SmallRun(tmp_path, nano_path, CHANGES)
    run = small.start("train", "small.toml")
    assert run.stdout is not None
    try:
        said = []
        for line in run.stdout:
            said.append(line)
            if " train " in line:
                break
        assert run.poll() is None, ("".join(said), run.communicate())
        state = held_still_with_sandboxes(run.pid)
        groups = [Path(line) for line in (state / "cgroups").read_text().splitlines()]
        own = processes_with(small.mark)
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in own}
        for module in ("ale.policy.engine_process", "ale.learner.learner_process"):
            assert any(module in command for command in commands.values())
        watched = [os.pidfd_open(pid) for pid in own]
    finally:
        run.kill()
        run.communicate(timeout=DEADLINE_S)

    async def start_again() -> None:
        async with open_engine("local") as engine:
            assert await asyncio.to_thread(ended, watched) == len(watched)
            assert not processes_with(small.mark)
            assert not processes_with(state.name)
            assert not any(state.name in line for line in mounts())
            assert not state.exists()
            assert not any(group.exists() for group in groups)
            assert (await engine.run(SandboxSpec(), Command(shell="echo well"))).stdout == b"well\n"

    asyncio.run(start_again())
    assert not list(default_parent().glob(f"{PREFIX}{run.pid}-*"))
