"""The embedded engine in a process of its own: the asyncio side of `engine_process`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ale.errors import PolicyError
from ale.messages import (
    EndSession,
    EngineStatistics,
    Generate,
    GetStatistics,
    LoadWeights,
    OpenEngine,
    SetThreads,
    Turn,
)
from ale.process import WorkerProcess

_OPEN_DEADLINE_S = 300.0
_CONTROL_DEADLINE_S = 60.0


class EmbeddedPolicy:
    """A `Policy` whose tokens come from the engine's process. `turn_deadline_s` bounds one turn."""

    def __init__(self, worker: WorkerProcess, version: int, turn_deadline_s: float) -> None:
        self._worker = worker
        self._turn_deadline_s = turn_deadline_s
        self.version = version

    async def generate(self, request: Generate) -> Turn:
        return await self._worker.ask(request, deadline_s=self._turn_deadline_s)

    async def end_session(self, session: str) -> None:
        await self._worker.ask(EndSession(session=session), deadline_s=_CONTROL_DEADLINE_S)

    async def load_weights(self, version: int, slot: int) -> None:
        await self._worker.ask(LoadWeights(version=version, slot=slot), deadline_s=_CONTROL_DEADLINE_S)
        self.version = version

    async def set_threads(self, threads: int) -> None:
        await self._worker.ask(SetThreads(threads=threads), deadline_s=_CONTROL_DEADLINE_S)

    async def statistics(self) -> EngineStatistics:
        return await self._worker.ask(GetStatistics(), deadline_s=_CONTROL_DEADLINE_S)


@asynccontextmanager
async def open_embedded(settings: OpenEngine, *, turn_deadline_s: float = 120.0) -> AsyncIterator[EmbeddedPolicy]:
    """Starts the engine's process and ends it on leaving. Raises `ModelError` when the model cannot be used."""
    fds = () if settings.weights_fd is None else (settings.weights_fd,)
    env = {"OMP_NUM_THREADS": str(settings.threads)}
    async with WorkerProcess("ale.policy.engine_process", error=PolicyError, pass_fds=fds, env=env) as worker:
        opened = await worker.ask(settings, deadline_s=_OPEN_DEADLINE_S)
        yield EmbeddedPolicy(worker, opened.version, turn_deadline_s)
