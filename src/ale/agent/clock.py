"""The time that a task may take. It stands still while the user is asked: how long people think is not the agent's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Clock:
    """`async with Clock(600).running() as clock:` raises TimeoutError where it has run out; `clock.expired` says so."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._timeout = asyncio.timeout(None)
        self._ends = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Clock]:
        loop = asyncio.get_running_loop()
        self._ends = loop.time() + self._limit_s
        self._timeout = asyncio.timeout_at(self._ends)
        async with self._timeout:
            yield self

    @contextmanager
    def paused(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._timeout.reschedule(None)
        try:
            yield
        finally:
            self._ends += loop.time() - began
            self._timeout.reschedule(self._ends)

    @property
    def expired(self) -> bool:
        return self._timeout.expired()

    @property
    def left(self) -> float:
        """The share that is left, while it runs."""
        return (self._ends - asyncio.get_running_loop().time()) / self._limit_s
