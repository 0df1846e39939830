"""How many episodes run at once: as many as engine and machine can take, `rollout.concurrency` at most.

`adapt` decides, a pure function of what is seen: additive increase, multiplicative decrease (Chiu and Jain 1989). The
actor looks once a second and moves the limit of `Episodes`; what it saw last is what the run's metrics show.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from ale.actor import Actor
from ale.actors.episodes import Episodes
from ale.errors import DeadlineExceeded, PolicyError, WorkerDied
from ale.messages import EngineStatistics

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_KV_FULL = 0.95  # of the engine's cache: beyond it, sequences are evicted and computed again
_QUEUE = 1 / 8  # of the running sequences may wait: a group that begins all at once is no pressure
_DECREASE = 0.75
_INCREASE = 1 / 16


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """`Pressure(running=48, engine_running=16, engine_waiting=9, kv_used=0.4, sandbox_room=120)`: at one moment."""

    running: int
    """Episodes under way."""
    engine_running: int
    engine_waiting: int
    """Turns that wait for a place in the engine."""
    kv_used: float
    """Share of the engine's cache; 0 where it has no bound of its own."""
    sandbox_room: int
    """Sandboxes that the machine could start now, besides those that run."""


def adapt(limit: int, seen: Pressure, *, most: int) -> int:
    """The next limit: lower by a quarter under pressure, higher by a sixteenth where all places are taken without any,
    and as it is where there are free places, for then nobody knows what more of them would do."""
    queue = seen.engine_waiting > max(1.0, seen.engine_running * _QUEUE)
    if queue or seen.kv_used > _KV_FULL or seen.sandbox_room < 1:
        return max(1, int(min(limit, max(seen.running, 1)) * _DECREASE))
    if seen.running < limit:
        return limit
    return min(most, limit + max(1, int(limit * _INCREASE)))


def free_memory_mb() -> int:
    """What new processes can have without swapping; where the kernel does not say that, what nobody uses."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) // 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


class Concurrency(Actor):
    """`engine` and `sandbox_room` are asked each second. Not `adaptive`: it only looks. An engine that gives no answer
    changes nothing: whoever needs it will say so."""

    def __init__(
        self,
        episodes: Episodes,
        engine: Callable[[], Awaitable[EngineStatistics]],
        sandbox_room: Callable[[], int],
        *,
        most: int,
        adaptive: bool,
    ) -> None:
        super().__init__("concurrency", capacity=1)
        self._episodes = episodes
        self._engine = engine
        self._sandbox_room = sandbox_room
        self._most = most
        self._adaptive = adaptive
        self.seen: EngineStatistics | None = None
        """What the engine said last."""

    def load(self) -> dict[str, float]:
        """For the record of an update."""
        places = {"episodes_running": float(self._episodes.running), "episodes_allowed": float(self._episodes.limit)}
        if self.seen is None:
            return places
        seen = self.seen
        return places | {
            "engine_running": float(seen.running),
            "engine_waiting": float(seen.waiting),
            "engine_s": seen.busy_s,
        }

    async def started(self) -> None:
        if self._adaptive:
            self._episodes.limit = max(1, self._most // 2)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                self.seen = engine = await self._engine()
            except (PolicyError, WorkerDied, DeadlineExceeded) as error:
                logger.info("the engine does not say how busy it is: %s", error)
                continue
            if not self._adaptive:
                continue
            pressure = Pressure(
                running=self._episodes.running,
                engine_running=engine.running,
                engine_waiting=engine.waiting,
                kv_used=engine.kv_used,
                sandbox_room=self._sandbox_room(),
            )
            limit = adapt(self._episodes.limit, pressure, most=self._most)
            if limit != self._episodes.limit:
                logger.debug("%d episodes at once instead of %d: %s", limit, self._episodes.limit, pressure)
                self._episodes.limit = limit
