"""The pool: an engine in front of an engine, which admits only what fits, and keeps warm what is asked for.

    async with open_engine("local") as engine, open_pool(engine, Capacity(count=64, memory_mb=16384)) as pool:
        async with pool.start(SandboxSpec(base=("environment",), label="run-1/episode-7")) as sandbox:
            ...

A warm sandbox is one that nobody has used yet; it is given out once. It shows its base as it was when it was warmed. As
many are kept per template (a spec but for its label) as were taken lately, within the capacity, and none while anybody
waits. Those that stay idle are pinged, and replaced when they have broken.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import structs

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.admission import Admission, Capacity, Cost
from ale.sandbox.held import Held
from ale.sandbox.port import Command, Completed, EngineStatistics, Sandbox, SandboxEngine, SandboxSpec
from ale.sandbox.shielded import shielded

logger = logging.getLogger(__name__)

_PING_S = 5.0


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    used: Cost
    """What is promised now, warm sandboxes included."""
    waiting: int
    warm: int
    granted: int
    """Cold starts and one-shot runs that were admitted."""
    hits: int
    """Starts that got a warm sandbox."""
    refused: int
    expired: int
    """Those whose deadline came before their turn."""
    broken: int
    """Sandboxes that failed: idle ones, which were replaced, and used ones, whose users were told."""


class _Kept(Held[Sandbox]):
    """A sandbox and what it is promised."""

    def __init__(self, engine: SandboxEngine, spec: SandboxSpec) -> None:
        super().__init__(engine.start(spec))
        self.cost = Cost.of(spec)


class _Template:
    def __init__(self, spec: SandboxSpec) -> None:
        self.spec = spec
        self.idle: deque[_Kept] = deque()
        self.taken: deque[float] = deque()  # when, lately


class Pool:
    """Made by `open_pool`. A SandboxEngine; `start` and `run` raise SandboxBusy and DeadlineExceeded besides."""

    def __init__(
        self,
        engine: SandboxEngine,
        admission: Admission,
        *,
        max_warm: int,
        deadline_s: float,
        memory_s: float,
        pause_s: float,
    ) -> None:
        self._engine, self._admission = engine, admission
        self._max_warm, self._deadline_s, self._memory_s, self._pause_s = max_warm, deadline_s, memory_s, pause_s
        self._templates: dict[Hashable, _Template] = {}
        self._wake = asyncio.Event()
        self._hits = self._broken = 0

    @property
    def scratch(self) -> Path:
        return self._engine.scratch

    @asynccontextmanager
    async def start(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        kept, sandbox = await self._take(spec)
        try:
            yield sandbox
        except SandboxError:
            self._broken += 1
            raise
        finally:
            await shielded(self._let_go(kept))

    async def run(self, spec: SandboxSpec, command: Command) -> Completed:
        cost = await self._admit(spec)
        try:
            return await self._engine.run(spec, command)
        finally:
            self._give_back(cost)

    def capabilities(self) -> Mapping[str, str]:
        return self._engine.capabilities()

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()

    def pool_statistics(self) -> PoolStatistics:
        admission = self._admission
        return PoolStatistics(
            used=admission.used,
            waiting=admission.waiting,
            warm=sum(len(template.idle) for template in self._templates.values()),
            granted=admission.granted,
            hits=self._hits,
            refused=admission.refused,
            expired=admission.expired,
            broken=self._broken,
        )

    async def aclose(self) -> None:
        """Closes what is warm; what is in use is its users' to close, and the engine its owner's."""
        idle = [kept for template in self._templates.values() for kept in template.idle]
        self._templates.clear()
        await asyncio.gather(*(self._let_go(kept) for kept in idle))

    # -- taking

    async def _take(self, spec: SandboxSpec) -> tuple[_Kept, Sandbox]:
        template = self._templates.setdefault(_key(spec), _Template(structs.replace(spec, label="")))
        template.taken.append(time.monotonic())
        while template.idle:
            kept = template.idle.popleft()
            sandbox = await self._if_well(kept)
            if sandbox is not None:
                sandbox.assign(spec.label)
                self._hits += 1
                self._wake.set()
                return kept, sandbox
        self._wake.set()
        await self._admit(spec)
        kept = _Kept(self._engine, spec)
        try:
            return kept, await kept.value()
        except BaseException:
            await shielded(self._let_go(kept))
            raise

    async def _admit(self, spec: SandboxSpec) -> Cost:
        cost = Cost.of(spec)
        if not self._admission.fits(cost):
            self._wake.set()  # what is warm makes room
        await self._admission.admit(spec.label.partition("/")[0], cost, self._deadline_s)
        return cost

    def _give_back(self, cost: Cost) -> None:
        self._admission.give_back(cost)
        self._wake.set()

    async def _let_go(self, kept: _Kept) -> None:
        try:
            await kept.close()
        finally:
            self._give_back(kept.cost)

    async def _if_well(self, kept: _Kept) -> Sandbox | None:
        """The sandbox when it answers; else it is closed and counted."""
        try:
            sandbox = await kept.value()
            await sandbox.ping(deadline_s=_PING_S)
        except (SandboxError, DeadlineExceeded):
            self._broken += 1
        except BaseException:
            await shielded(self._let_go(kept))
            raise
        else:
            return sandbox
        await shielded(self._retire(kept))
        return None

    async def _retire(self, kept: _Kept) -> None:
        """`_let_go` of one that nobody uses, so that nobody can be told when it does not close."""
        try:
            await self._let_go(kept)
        except (SandboxError, DeadlineExceeded):
            self._broken += 1
            logger.exception("a warm sandbox was not closed as it should be")

    # -- keeping warm

    async def keep(self) -> None:
        """Warms, cools and pings, for as long as the pool is open."""
        while True:
            try:
                async with asyncio.timeout(self._memory_s):
                    await self._wake.wait()
            except TimeoutError:
                await self._check_idle()
            self._wake.clear()
            await self._cool()
            await self._warm()

    def _wanted(self, template: _Template) -> int:
        since = time.monotonic() - self._memory_s
        while template.taken and template.taken[0] < since:
            template.taken.popleft()
        return min(self._max_warm, len(template.taken))

    async def _cool(self) -> None:
        for key, template in list(self._templates.items()):
            wanted = self._wanted(template) if not self._admission.waiting else 0
            while len(template.idle) > wanted:
                await self._retire(template.idle.pop())
            if not template.taken and not template.idle:
                del self._templates[key]

    def _lacks(self, template: _Template, cost: Cost) -> bool:
        if len(template.idle) >= self._wanted(template) or self._admission.waiting:
            return False
        return self._admission.fits(cost)

    async def _warm(self) -> None:
        for template in list(self._templates.values()):
            cost = Cost.of(template.spec)
            while self._lacks(template, cost):
                await asyncio.sleep(self._pause_s)
                if not self._lacks(template, cost):
                    break
                self._admission.take(cost)
                kept = _Kept(self._engine, template.spec)
                try:
                    await kept.value()
                except (SandboxError, DeadlineExceeded):
                    self._broken += 1
                    await self._retire(kept)
                    return  # whoever needs it next is told why; no loop of failures here
                except BaseException:
                    await shielded(self._let_go(kept))
                    raise
                template.idle.append(kept)

    async def _check_idle(self) -> None:
        for template in list(self._templates.values()):
            for _ in range(len(template.idle)):
                kept = template.idle.popleft()
                if await self._if_well(kept) is not None:
                    template.idle.append(kept)


def _key(spec: SandboxSpec) -> Hashable:
    """What sandboxes have to share for one to stand in for another: all but the label."""
    maps = (tuple(sorted(spec.env.items())), tuple(sorted(spec.sessions.items())))
    fields = [getattr(spec, name) for name in spec.__struct_fields__ if name not in ("env", "sessions", "label")]
    return (*maps, *fields)


@asynccontextmanager
async def open_pool(
    engine: SandboxEngine,
    capacity: Capacity,
    *,
    max_waiting: int = 1024,
    max_warm: int = 8,
    deadline_s: float = 60.0,
    memory_s: float = 30.0,
    pause_s: float = 0.02,
) -> AsyncIterator[Pool]:
    """A pool in front of an open engine.

    `max_warm`: idle sandboxes per template at most; `deadline_s`: the longest wait for a place; `memory_s`: how long a
    demand is remembered, and how often what is idle is pinged; `pause_s`: before each start that nobody waits for: it
    would slow down the first commands of what was just taken.
    """
    pool = Pool(
        engine,
        Admission(capacity, max_waiting=max_waiting),
        max_warm=max_warm,
        deadline_s=deadline_s,
        memory_s=memory_s,
        pause_s=pause_s,
    )
    keeping = asyncio.ensure_future(pool.keep())
    try:
        yield pool
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        await shielded(pool.aclose())
        if not keeping.cancelled():
            keeping.result()
