"""An event loop whose clock jumps: a scenario of hours takes as long as its computation. For simulations and for tests.

    result = run(scenario())      `await asyncio.sleep(3600)` inside returns at once; `loop.time()` has moved by 3600

When nothing can run and nothing is scheduled, every task waits for ever: `run` raises `Deadlock` instead of hanging.
Time jumps only while no file descriptor is ready, so work in threads or subprocesses needs a real loop instead.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits, and no timer will ever wake one. The message lists them."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.BaseSelector):
    """Asks the real selector what is ready, and if nothing is, moves the clock instead of waiting."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            waiting = ", ".join(sorted(task.get_name() for task in asyncio.all_tasks(self._loop)))
            raise Deadlock(f"no timer is set and every task waits: {waiting}")
        self._loop.now += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, on a virtual clock that starts at 0."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(scenario)
