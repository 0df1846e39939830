"""Waits that are not on a bus, named all the same, and what a run is known to do: one register for each event loop.

    async with waiting("a turn of the engine", on="process engine", deadline_s=120): ...    names and bounds
    with named("the command's end", release="its time-out (30 s)"): ...                      names; bounded elsewhere
    progressed("a rollout was scored")                                                       what the watchdog counts

Whoever looks (`bus.waits()`, `ale why`) finds them by the loop, so that code below the actors (sandboxes, workers)
need not be given a bus.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from math import inf
from weakref import WeakKeyDictionary

from ale.errors import DeadlineExceeded
from ale.mailbox import OWNER, Waiter
from ale.unnamed import Unnamed
from ale.vitals import ProcessState


class Register:
    """What is known of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.named: set[Waiter] = set()
        self.unnamed = Unnamed()
        self.processes: dict[str, Callable[[], ProcessState]] = {}
        """How each worker process is, by name."""
        self.recorders: list[Callable[[Waiter, float], None]] = []
        """They hear of every named wait when it ends: the timelines of the runs in this loop."""
        self.holds = 0
        """Waits that are no silence, however long they last."""
        self.counters: Counter[str] = Counter()
        """Things that were counted since the loop began: restarts, turns that were asked for again."""
        self.progress = "it began"
        self.progress_at = loop.time()
        self.failures: Counter[str] = Counter()
        """What ended without being progress, since the last progress."""


_registers: WeakKeyDictionary[asyncio.AbstractEventLoop, Register] = WeakKeyDictionary()


def register() -> Register:
    """That of the running loop."""
    loop = asyncio.get_running_loop()
    found = _registers.get(loop)
    if found is None:
        found = _registers[loop] = Register(loop)
    return found


def progressed(what: str) -> None:
    """Something was finished that brings the run on. Failures are none, nor is what can be begun again for ever."""
    seen = register()
    seen.progress, seen.progress_at = what, asyncio.get_running_loop().time()
    seen.failures.clear()


def failed(what: str) -> None:
    """Something ended that was to bring the run on, and did not: `failed("episode_timeout")`."""
    register().failures[what] += 1


@contextmanager
def recorded(recorder: Callable[[Waiter, float], None]) -> Iterator[None]:
    """Meanwhile `recorder` hears of every named wait that ends. The loop may outlive whoever listens."""
    known = register()
    known.recorders.append(recorder)
    try:
        yield
    finally:
        known.recorders.remove(recorder)


@contextmanager
def named(
    what: str, *, on: str | None = None, release: str = "", deadline_s: float = inf, idle: bool = False
) -> Iterator[Waiter]:
    """Names a wait that is bounded elsewhere: `deadline_s` is what is told of that. The fields are those of `Wait`."""
    loop = asyncio.get_running_loop()
    since, known = loop.time(), register()
    task = asyncio.current_task()
    waiter = Waiter(loop.create_future(), what, since, since + deadline_s, task, on, OWNER.get(), idle, release)
    known.named.add(waiter)
    try:
        yield waiter
    finally:
        known.named.discard(waiter)
        for recorder in known.recorders:
            recorder(waiter, loop.time())


@contextmanager
def held_up(what: str, *, release: str, on: str | None = None, deadline_s: float = inf) -> Iterator[None]:
    """Names a wait that holds the run up rightly: for whoever embeds it, for a model that is loaded within a deadline
    of its own. The watchdog does not count it as silence."""
    known = register()
    known.holds += 1
    try:
        with named(what, on=on, release=release, deadline_s=deadline_s):
            yield
    finally:
        known.holds -= 1


@asynccontextmanager
async def waiting(
    what: str, *, on: str | None = None, release: str = "", deadline_s: float = inf
) -> AsyncIterator[None]:
    """Names a wait and bounds it. Raises `DeadlineExceeded`."""
    with named(what, on=on, release=release, deadline_s=deadline_s) as waiter:
        try:
            async with asyncio.timeout(None if deadline_s == inf else deadline_s) as scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(waiter.sentence(), deadline_s) from error
