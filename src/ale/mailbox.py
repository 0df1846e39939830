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
from math import inf
from typing import Any

import msgspec

from ale.errors import ActorStopped, DeadlineExceeded
from ale.wire import Message


class Envelope(msgspec.Struct, eq=False):
    """A message on its way. Times are of the event loop's clock, in seconds."""

    message: Message
    since: float
    reply: asyncio.Future[Any] | None = None
    """None: the message was told and nobody waits for an answer."""
    deadline: float = inf
    sender: asyncio.Task[Any] | None = None


class Wait(msgspec.Struct, frozen=True):
    """Somebody waits: `Wait("trainer", "a message to 'trainer'", 2.5, None)`."""

    who: str
    what: str
    waited_s: float
    deadline_s: float | None
    """How long the wait may last in all; None for one that lasts until work arrives."""


class Waiter(msgspec.Struct, eq=False):
    """A task that waits for `ready`; whoever sweeps the deadlines fails it once `deadline` has passed."""

    ready: asyncio.Future[None]
    what: str
    since: float
    deadline: float
    task: asyncio.Task[Any] | None

    def seen(self, now: float) -> Wait:
        return Wait(name_of(self.task), self.what, now - self.since, allowed(self.since, self.deadline))

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

    `free` counts the slots that are neither filled nor promised; senders take the fast path while it is above zero:
    `mailbox.free -= 1; mailbox.put(envelope)`. Else they `await mailbox.reserve(...)` before they put.
    """

    def __init__(self, owner: str, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"the mailbox of {owner} needs a capacity of at least 1, not {capacity}")
        self.owner = owner
        self.capacity = capacity
        self.free = capacity
        self.items: deque[Envelope] = deque()
        self.high_water = 0
        self.closed = False
        self.cause: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._held: deque[Waiter] = deque()
        self._readers: deque[Waiter] = deque()

    # Sending

    async def reserve(self, what: str, since: float, deadline: float) -> None:
        """Returns once the caller owns a slot, which it then fills with `put` or gives back with `release`.

        Raises `DeadlineExceeded` when the deadline passes first and `ActorStopped` when the mailbox closes.
        """
        self.check_open()
        if self.free > 0:
            self.free -= 1
            return
        await self._wait_in(self._held, what, since, deadline)
        self.check_open()

    def put(self, envelope: Envelope) -> None:
        """Fills a slot that the caller owns."""
        items = self.items
        items.append(envelope)
        if len(items) > self.high_water:
            self.high_water = len(items)
        if self._readers:
            _wake_next(self._readers)

    def release(self) -> None:
        """Gives a slot to the sender that has waited longest, or back to `free`."""
        if not _wake_next(self._held) and not self.closed:
            self.free += 1

    # Reading

    def take(self) -> Envelope:
        """The oldest envelope; the caller has looked that there is one."""
        envelope = self.items.popleft()
        if self._held or self.closed:
            self.release()
        else:
            self.free += 1
        return envelope

    async def wait(self, what: str, since: float, deadline: float = inf) -> None:
        """Returns when there may be something to take, or the mailbox was closed: look again."""
        await self._wait_in(self._readers, what, since, deadline)

    # Ending

    def close(self, cause: BaseException | None = None) -> None:
        """Refuses senders from now on, those that wait included; what is inside can still be taken."""
        if self.closed:
            return
        self.closed, self.cause, self.free = True, cause, 0
        for sender in self._held:
            if not sender.ready.done():
                sender.ready.set_exception(self.refusal())
        for reader in self._readers:
            if not reader.ready.done():
                reader.ready.set_result(None)
        self._held.clear()
        self._readers.clear()

    def check_open(self) -> None:
        if self.closed:
            raise self.refusal()

    def refusal(self) -> ActorStopped:
        if self.cause is None:
            return ActorStopped(f"{self.owner} has ended and takes no more messages")
        error = ActorStopped(f"{self.owner} has ended: {type(self.cause).__name__}: {self.cause}")
        error.__cause__ = self.cause
        return error

    # Looking from outside

    def waits(self, now: float) -> Iterator[Wait]:
        for waiter in (*self._held, *self._readers):
            if not waiter.ready.done():
                yield waiter.seen(now)

    def expire(self, now: float) -> float:
        """Fails every wait whose deadline has passed; returns the earliest deadline that is left."""
        earliest = inf
        for waiter in (*self._held, *self._readers):
            waiter.expire(now)
            if not waiter.ready.done():
                earliest = min(earliest, waiter.deadline)
        return earliest

    @property
    def held(self) -> int:
        """How many senders wait for a slot."""
        return sum(not waiter.ready.done() for waiter in self._held)

    async def _wait_in(self, queue: deque[Waiter], what: str, since: float, deadline: float) -> None:
        waiter = Waiter(self._loop.create_future(), what, since, deadline, asyncio.current_task())
        queue.append(waiter)
        try:
            await waiter.ready
        except BaseException:
            ready = waiter.ready
            if ready.done() and not ready.cancelled() and ready.exception() is None:
                # Woken and cancelled at once: what this task was woken for goes to the next in line.
                if queue is self._held:
                    self.release()
                elif self.items:
                    _wake_next(self._readers)
            else:
                with suppress(ValueError):
                    queue.remove(waiter)
            raise


def _wake_next(queue: deque[Waiter]) -> bool:
    while queue:
        waiter = queue.popleft()
        if not waiter.ready.done():
            waiter.ready.set_result(None)
            return True
    return False
