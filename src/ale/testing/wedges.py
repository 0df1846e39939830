"""Parts of a run that never come to an end, to see whether a run says so: sandboxes, tests, learners, readers.

envs = Envs(play)                                          play(envs, rollout) makes each episode
SilentSandboxes(tmp_path, "exec", answer=Completed())       take the place of a `SandboxEngine`
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from ale.actor import Actor
from ale.messages import Rollout, Trajectory
from ale.process import WorkerProcess
from ale.wire import Message, Reply, Request


async def for_ever() -> Any:
    """Waits, and does not say for what."""
    await asyncio.get_running_loop().create_future()


class _Snapshot:
    async def release(self) -> None:
        pass


class SilentSandboxes:
    """An engine whose sandboxes start; what is named in `silent` ("exec", "run" or "start") never answers,
    and what is not gets `answer`."""

    def __init__(self, scratch: Path, *silent: str, answer: Any) -> None:
        self.scratch = scratch
        self._silent = silent
        self._answer = answer

    @asynccontextmanager
    async def start(self, spec: Any) -> AsyncIterator[SilentSandboxes]:
        await self._may_answer("start")
        yield self

    async def run(self, spec: Any, command: Any) -> Any:
        await self._may_answer("run")
        return self._answer

    async def exec(self, command: Any) -> Any:
        await self._may_answer("exec")
        return self._answer

    async def snapshot(self) -> _Snapshot:
        return _Snapshot()

    def audit(self) -> tuple[()]:
        return ()

    def alarms(self) -> tuple[()]:
        return ()

    async def _may_answer(self, what: str) -> None:
        if what in self._silent:
            await for_ever()


class Envs(Actor):
    """The actor "envs", each episode of which is `play`."""

    def __init__(self, play: Callable[[Envs, Rollout], Any], *, concurrency: int = 64) -> None:
        super().__init__("envs", capacity=4 * concurrency, concurrency=concurrency)
        self._play = play
        self.received: list[Rollout] = []
        self.running = 0

    async def receive(self, message: Message) -> Trajectory | None:
        match message:
            case Rollout():
                self.received.append(message)
                return cast(Trajectory, await self._play(self, message))
            case _:
                await super().receive(message)
        return None


class ProcessLearner:
    """A learner whose answers come, or do not come, from a worker process, which is asked `request` instead."""

    def __init__(self, worker: WorkerProcess, request: Request[Any]) -> None:
        self._worker = worker
        self._request = request

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        return cast(Reply, await self._worker.ask(self._request, deadline_s=deadline_s))


class DeafReader(Actor):
    """Takes one message, and is never done with it."""

    def __init__(self) -> None:
        super().__init__("reader", capacity=1)

    async def receive(self, message: Message) -> None:
        await for_ever()
