"""A bounded queue in which a cancelled sender or reader loses nothing and leaves nothing behind.

A sender first owns a slot, then puts; between the two there is no await. So a cancelled sender either put its envelope
or did not, and a slot that was handed to it in the very moment of its cancellation goes on to the next in line.
Senders are served in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from math import inf
from typing import Any

import msgspec

from ale.errors import ActorStopped, DeadlineExceeded
from ale.wire import Message

OWNER: ContextVar[str | None] = ContextVar("the actor whose task this is", default=None)
"""Tasks inherit it: what an actor's children wait for is known as the actor's wait."""


class Envelope(msgspec.Struct, eq=False, gc=False):
    """A message on its way, told or published. Times are of the event loop's clock, in seconds.

    The garbage collector need not look at it (`gc=False`): it holds plain data, which forms no cycle.
    """

    message: Message
    since: float


class Ask(Envelope, eq=False, gc=True):
    """A message whose sender waits for `reply`."""

    reply: asyncio.Future[Any]
    deadline: float
    sender: asyncio.Task[Any] | None
    of: str | None = None


class Wait(msgspec.Struct, frozen=True, omit_defaults=True):
    """Somebody waits: `Wait("trainer", "a message to 'trainer'", 2.5, None)`."""

    who: str
    what: str
    waited_s: float
    deadline_s: float | None
    """How long the wait may last in all; None for one that lasts until work arrives."""
    on: str | None = None
    """Who could end it: "actor buffer", "task envs/3", "process engine"; None: see `release`."""
    of: str | None = None
    """The actor whose task waits."""
    idle: bool = False
    """It has nothing to do, and holds nobody up."""
    release: str = ""
    """What ends it, where that is nobody in this process."""
    named: bool = True
    """False: found by looking where the task stands in its code."""


class Waiter(msgspec.Struct, eq=False):
    """A task that waits for `ready`; whoever sweeps the deadlines fails it once `deadline` has passed."""

    ready: asyncio.Future[None]
    what: str
    since: float
    deadline: float
    task: asyncio.Task[Any] | None
    on: str | None = None
    of: str | None = None
    idle: bool = False
    release: str = ""

    def seen(self, now: float) -> Wait:
        waited_s, deadline_s = now - self.since, allowed(self.since, self.deadline)
        who = name_of(self.task)
        return Wait(who, self.what, waited_s, deadline_s, self.on, self.of, self.idle, self.release)

    @property
    def woken(self) -> bool:
        ready = self.ready
        return ready.done() and not ready.cancelled() and ready.exception() is None

    def sentence(self) -> str:
        return f"{name_of(self.task)} waits for {self.what}"

    def expire(self, now: float) -> None:
        if self.deadline <= now and not self.ready.done():
            self.ready.set_exception(DeadlineExceeded(self.sentence(), self.deadline - self.since))


def name_of(task: asyncio.Task[Any] | None) -> str:
    return task.get_name() if task is not None else "somebody"


def allowed(since: float, deadline: float) -> float | None:
    return None if deadline == inf else deadline - since


class Mailbox:
    """Envelopes in order of arrival, at most `capacity` of them.

    `room` is how many may lie inside just now: the capacity less the slots promised to senders that waited, 0 once
    closed. A sender tries `offer`; refused, it awaits `reserve` and then puts.
    """

    def __init__(self, place: str, capacity: int, reader: str | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"{place} needs a capacity of at least 1, not {capacity}")
        self.place = place
        self.reader = reader
        """Who makes room: "actor buffer"."""
        self.capacity = capacity
        self.room = capacity
        self.items: deque[Envelope] = deque()
        self.high_water = 0
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self.held: deque[Waiter] = deque()
        """Senders that wait for a slot."""
        self._readers: deque[Waiter] = deque()
        self._room_in = f"room in {place}"
        self._message_in = f"a message in {place}"

    # Sending

    def offer(self, envelope: Envelope) -> bool:
        """Puts without waiting; False when there is no room, or somebody waits for it already."""
        items = self.items
        depth = len(items)
        if depth >= self.room:
            return False
        items.append(envelope)
        if depth >= self.high_water:
            self.high_water = depth + 1
        if self._readers:
            _wake_next(self._readers)
        return True

    async def reserve(self, since: float, deadline: float) -> None:
        """Returns once the caller owns a slot, which it then fills with `put` or gives back with `release`.

        Raises `DeadlineExceeded` when the deadline passes first and `ActorStopped` when the mailbox closes.
        """
        self.check_open()
        if len(self.items) < self.room:
            self.room -= 1
            return
        ready, task = self._loop.create_future(), asyncio.current_task()
        waiter = Waiter(ready, self._room_in, since, deadline, task, self.reader, OWNER.get())
        self.held.append(waiter)
        try:
            await waiter.ready
        except BaseException:
            if waiter.woken:  # and cancelled at once
                self.release()
            else:
                _leave(self.held, waiter)
            raise
        self.check_open()

    def put(self, envelope: Envelope) -> None:
        """Fills a slot that the caller owns."""
        self.room += 1
        self.offer(envelope)

    def release(self) -> None:
        """Gives back a slot that the caller owns: the next sender in line gets it."""
        if not self.closed:
            self.room += 1
            self.promise()

    def promise(self) -> None:
        """Promises a free slot to the sender that has waited longest."""
        if _wake_next(self.held):
            self.room -= 1

    # Reading

    def take(self) -> Envelope:
        """The oldest envelope; the caller has looked that there is one."""
        envelope = self.items.popleft()
        if self.held:
            self.promise()
        return envelope

    async def wait(self, since: float, deadline: float = inf) -> None:
        """Returns when there may be something to take, or the mailbox was closed: look again."""
        ready, task = self._loop.create_future(), asyncio.current_task()
        waiter = Waiter(ready, self._message_in, since, deadline, task, None, OWNER.get(), True)
        self._readers.append(waiter)
        try:
            await waiter.ready
        except BaseException:
            if not waiter.woken:
                _leave(self._readers, waiter)
            elif self.items:  # cancelled at once: somebody else reads what this task was woken for
                _wake_next(self._readers)
            raise

    # Ending

    def close(self) -> None:
        """Refuses senders from now on, those that wait included; what is inside can still be taken."""
        if self.closed:
            return
        self.closed, self.room = True, 0
        while _wake_next(self.held):
            pass  # each finds the mailbox closed
        while _wake_next(self._readers):
            pass

    def check_open(self) -> None:
        if self.closed:
            raise self.refusal()

    def refusal(self) -> ActorStopped:
        return ActorStopped(f"{self.place} is closed")

    # Looking from outside

    def waits(self, now: float) -> Iterator[Wait]:
        for waiter in (*self.held, *self._readers):
            if not waiter.ready.done():
                yield waiter.seen(now)

    def waiting(self) -> Iterator[asyncio.Task[Any]]:
        """The tasks that wait for room or for a message."""
        return (waiter.task for waiter in (*self.held, *self._readers) if waiter.task is not None)

    def expire(self, now: float) -> float:
        """Fails every wait whose deadline has passed; returns the earliest deadline that is left."""
        earliest = inf
        for waiter in (*self.held, *self._readers):
            waiter.expire(now)
            if not waiter.ready.done():
                earliest = min(earliest, waiter.deadline)
        return earliest


def _wake_next(queue: deque[Waiter]) -> bool:
    while queue:
        waiter = queue.popleft()
        if not waiter.ready.done():
            waiter.ready.set_result(None)
            return True
    return False


def _leave(queue: deque[Waiter], waiter: Waiter) -> None:
    with suppress(ValueError):  # `_wake_next` may have passed over it already
        queue.remove(waiter)
