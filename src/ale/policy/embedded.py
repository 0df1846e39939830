"""The embedded engine in a process of its own: the asyncio side of `engine_process`.

An engine that dies is started again with the weights that it had, which lie in the ring. Its turns in flight are asked
for again: a token depends on the seed and its position alone, so the same turn comes of it while the weights are the
same, and each token names its version where they are not.
"""

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
from ale.policy.kept import KeptWorker
from ale.process import WorkerProcess
from ale.waiting import held_up

_OPEN_DEADLINE_S = 300.0
_CONTROL_DEADLINE_S = 60.0


class EmbeddedPolicy:
    """A `Policy` whose tokens come from the engine's process. `turn_deadline_s` bounds one turn."""

    def __init__(self, settings: OpenEngine, turn_deadline_s: float, restarts: int, heartbeat_s: float) -> None:
        self._settings = settings
        self._turn_deadline_s = turn_deadline_s
        # What is asked between two steps waits for the end of one, or until an engine that is stuck in one was killed.
        self.control_deadline_s = max(_CONTROL_DEADLINE_S, turn_deadline_s, 2 * heartbeat_s)
        self.version = 0
        self._weights: LoadWeights | None = None
        self._threads: SetThreads | None = None
        self.engine = KeptWorker(self._make, self._bring_up, restarts=restarts, heartbeat_s=heartbeat_s)

    async def generate(self, request: Generate) -> Turn:
        return await self.engine.ask(request, deadline_s=self._turn_deadline_s)

    async def end_session(self, session: str) -> None:
        await self.engine.ask(EndSession(session=session), deadline_s=self.control_deadline_s)

    async def load_weights(self, version: int, slot: int) -> None:
        self._weights = LoadWeights(version=version, slot=slot)
        await self.engine.ask(self._weights, deadline_s=self.control_deadline_s)
        self.version = version

    def counters(self) -> dict[str, float]:
        return {}

    async def watch(self) -> None:
        await self.engine.watch()

    async def set_threads(self, threads: int) -> None:
        self._threads = SetThreads(threads=threads)
        await self.engine.ask(self._threads, deadline_s=self.control_deadline_s)

    async def statistics(self) -> EngineStatistics:
        return await self.engine.ask(GetStatistics(), deadline_s=self.control_deadline_s)

    def _make(self) -> WorkerProcess:
        fd = self._settings.weights_fd
        env = {"OMP_NUM_THREADS": str(self._settings.threads)}
        fds = () if fd is None else (fd,)
        return WorkerProcess("ale.policy.engine_process", error=PolicyError, pass_fds=fds, env=env)

    async def _bring_up(self, worker: WorkerProcess) -> None:
        with held_up("the engine to load its model", release="its end", on="process engine"):
            opened = await worker.ask(self._settings, deadline_s=_OPEN_DEADLINE_S)
        if self._threads is not None:
            await worker.ask(self._threads, deadline_s=self.control_deadline_s)
        if self._weights is not None:
            await worker.ask(self._weights, deadline_s=self.control_deadline_s)
        else:
            self.version = opened.version


@asynccontextmanager
async def open_embedded(
    settings: OpenEngine, *, turn_deadline_s: float = 120.0, restarts: int = 0, heartbeat_s: float = 0.0
) -> AsyncIterator[EmbeddedPolicy]:
    """Starts the engine's process and ends it on leaving. Raises `ModelError` when the model cannot be used.

    `restarts`: how often within an hour one that died is started again. Whoever wants one killed that says nothing for
    `heartbeat_s` runs `policy.watch()`.
    """
    policy = EmbeddedPolicy(settings, turn_deadline_s, restarts, heartbeat_s)
    async with policy.engine:
        yield policy
