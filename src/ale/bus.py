"""The bus: messages told to an actor, asked of it, or published to whoever subscribes.

    await bus.tell("buffer", group, deadline_s=60)           waits only while the inbox is full
    turn = await bus.ask("envs", Step(...), deadline_s=60)   `class Step(Request[Turn])`, so `turn` is a `Turn`
    with bus.publisher(Line) as lines: ...                   while it is held, there may be more
    with bus.subscribe(Line, "counter", capacity=64, overflow=Overflow.HOLD) as lines:
        async for line in lines: ...                         ends when the last publisher has closed

Messages pass by reference. `Bus(plain=True)` sends every message and every answer through msgpack first, which proves
that they are plain data and could cross to another process.

Deadlines cost almost nothing while they are kept: there is no timer per wait. An ask lies where it is anyway, in an
inbox or in an actor's hands, so one timer for the whole bus, set to the earliest deadline, walks over what is
outstanding. A deadline that passes is noticed at most `SWEEP_S` late.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import msgspec

from ale.errors import ActorError
from ale.inbox import ActorStatistics, Inbox
from ale.mailbox import OWNER, Ask, Envelope, Mailbox, Wait
from ale.topic import M, Overflow, Publisher, Subscription, Topic
from ale.waiting import register, waiting
from ale.wire import Message, Reply, Request, round_trip

SWEEP_S = 0.01
"""Shortest time between two sweeps: many deadlines close together share one."""


class SubscriptionStatistics(msgspec.Struct, frozen=True):
    topic: str
    reader: str
    depth: int
    capacity: int
    high_water: int
    received: int
    dropped: int
    held: int
    """Publishers that wait for room."""


class Statistics(msgspec.Struct, frozen=True):
    actors: dict[str, ActorStatistics]
    subscriptions: tuple[SubscriptionStatistics, ...]
    published: dict[str, int]
    """Messages published, by type."""


class Addresses(dict[str, Inbox]):
    def __missing__(self, address: str) -> Inbox:
        near = difflib.get_close_matches(address, self, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self) or 'none'}"
        raise ActorError(f"the bus has no actor named {address!r}; {hint}")


class Bus:
    """Routes messages by actor name and by message type. Built inside a running event loop, which it stays on."""

    def __init__(self, *, plain: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._plain = plain
        self._instant = 0.0
        """When the event loop's current turn began, if a message was told in it; else 0."""
        self._inboxes = Addresses()
        self._topics: dict[type[Message], Topic] = {}
        self._register = register()
        self._sweep_at = inf
        self._sweeper: asyncio.TimerHandle | None = None

    # Sending

    async def tell(self, address: str, message: Message, *, deadline_s: float) -> None:
        """Puts `message` into the actor's inbox; waits while that is full.

        Raises `DeadlineExceeded` when it stays full, `ActorStopped` when the actor has ended, `ActorError` for an
        unknown address and, on a plain bus, `TypeError` for a message that is not plain data. Cancelled, or on any
        error, the message was not sent.
        """
        inbox = self._inboxes[address]
        if self._plain:
            message = plain(message)
        envelope = Envelope(message, self._instant or self._tick())
        if not inbox.offer(envelope):
            since = self._now()
            self.watch(since + deadline_s)
            await inbox.reserve(since, since + deadline_s)
            inbox.put(envelope)
        inbox.told += 1

    def try_tell(self, address: str, message: Message) -> bool:
        """Like `tell`, but never waits: False, and nothing sent, when the inbox is full."""
        inbox = self._inboxes[address]
        inbox.check_open()
        if self._plain:
            message = plain(message)
        if not inbox.offer(Envelope(message, self._instant or self._tick())):
            return False
        inbox.told += 1
        return True

    async def ask(self, address: str, request: Request[Reply], *, deadline_s: float) -> Reply:
        """Sends `request` and returns what the actor's `receive` returns for it.

        Raises what `receive` raised; `ActorStopped` when the actor ends, or crashes while it works on this request;
        `DeadlineExceeded` when the answer takes longer than `deadline_s`, the wait for room included. The actor skips
        a request whose caller has gone before its turn came; one already begun is finished and its answer discarded,
        or cancelled where the actor is one that says `cancel_abandoned`.
        """
        inbox = self._inboxes[address]
        message: Message = plain(request) if self._plain else request
        since = self._now()
        deadline = since + deadline_s
        if deadline < self._sweep_at:
            self.watch(deadline)
        reply: asyncio.Future[Any] = self._loop.create_future()
        envelope = Ask(message, since, reply, deadline, asyncio.current_task(), OWNER.get())
        if not inbox.offer(envelope):
            await inbox.reserve(since, deadline)
            inbox.put(envelope)
        inbox.asked += 1
        answer: Reply = await reply
        return plain(answer) if self._plain else answer

    # Publishing

    def publisher(self, type_: type[M]) -> Publisher[M]:
        """The right to publish `type_`: until it is closed, readers wait for more. Use it with `with`."""
        return Publisher(self._topic(type_), plain if self._plain else None)

    def subscribe(self, type_: type[M], reader: str, *, capacity: int, overflow: Overflow) -> Subscription[M]:
        """What is published of exactly `type_` from now on. `reader` names the subscription in `statistics()`."""
        return self._topic(type_).subscribe(reader, capacity, overflow)

    # Looking from outside

    def statistics(self) -> Statistics:
        now = self._now()
        return Statistics(
            {name: inbox.statistics(now) for name, inbox in self._inboxes.items()},
            tuple(
                SubscriptionStatistics(
                    topic.name,
                    subscription.reader,
                    len(subscription.mailbox.items),
                    subscription.mailbox.capacity,
                    subscription.mailbox.high_water,
                    subscription.received,
                    subscription.dropped,
                    len(subscription.mailbox.held),
                )
                for topic in self._topics.values()
                for subscription in topic.subscriptions
            ),
            {topic.name: topic.published for topic in self._topics.values()},
        )

    def waits(self, *, everything: bool = False) -> list[Wait]:
        """Who waits for what and since when, longest first; what is named with `ale.waiting` included.

        `everything`: the idle waits of tasks that are only there to be woken too, and where the tasks stand in their
        code that wait for something without saying so.
        """
        now = self._now()
        found = [waiter.seen(now) for waiter in self._register.named if everything or not waiter.idle]
        for mailbox in self._mailboxes():
            found.extend(mailbox.waits(now))
        if everything:
            known = {waiter.task for waiter in self._register.named}
            for inbox in self._inboxes.values():
                known.update(inbox.senders())
            for mailbox in self._mailboxes():
                known.update(mailbox.waiting())
            found.extend(self._register.unnamed.look({task for task in known if task is not None}, now))
        return sorted(found, key=lambda wait: -wait.waited_s)

    @asynccontextmanager
    async def waiting(
        self, what: str, *, on: str | None = None, release: str = "", deadline_s: float = inf
    ) -> AsyncIterator[None]:
        """Names a wait for something that is not on the bus (a process, a semaphore) and bounds it.

        `async with bus.waiting("a free sandbox", deadline_s=30): await pool.acquire()` raises `DeadlineExceeded`. `on`
        and `release` are those of `Wait`.
        """
        async with waiting(what, on=on, release=release, deadline_s=deadline_s):
            yield

    # For supervisors

    def register(self, name: str, capacity: int) -> Inbox:
        """Opens an inbox at the address `name`; the address of an ended actor can be taken again."""
        if name in self._inboxes and not self._inboxes[name].closed:
            raise ValueError(f"the bus has an actor named {name!r} already: give each actor a name of its own")
        inbox = self._inboxes[name] = Inbox(name, capacity)
        return inbox

    # Deadlines

    def watch(self, deadline: float) -> None:
        """Makes sure that the deadlines are looked at soon after `deadline`."""
        if deadline >= self._sweep_at:
            return
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep_at = deadline
        self._sweeper = self._loop.call_at(deadline, self._sweep)

    def _sweep(self) -> None:
        self._sweep_at, self._sweeper = inf, None
        # The loop may run a timer a clock tick early; such a deadline has passed all the same.
        now = self._now()
        earliest = min((mailbox.expire(now) for mailbox in self._mailboxes()), default=inf)
        if earliest < inf:
            self.watch(max(earliest, now + SWEEP_S))

    def _mailboxes(self) -> list[Mailbox]:
        found: list[Mailbox] = list(self._inboxes.values())
        found.extend(subscription.mailbox for topic in self._topics.values() for subscription in topic.subscriptions)
        return found

    def _tick(self) -> float:
        """Reads the clock once for all that is told in this turn of the loop: a tenth of the price of a `tell`.

        Only how long a message has lain in an inbox is counted from it. Deadlines read the clock itself: they must
        not suffer from a handler that has kept the loop busy.
        """
        self._instant = self._now()
        self._loop.call_soon(self._forget)
        return self._instant

    def _forget(self) -> None:
        self._instant = 0.0

    def _topic(self, type_: type[Message]) -> Topic:
        topic = self._topics.get(type_)
        if topic is None:
            topic = self._topics[type_] = Topic(type_, self.watch)
        return topic


def plain(value: Any) -> Any:
    """What arrives when `value` goes through msgpack. Raises `TypeError` when it is not plain data."""
    if isinstance(value, msgspec.Struct):
        try:
            return round_trip(value)
        except (TypeError, msgspec.ValidationError) as error:
            raise TypeError(f"{type(value).__name__} is not plain data: {error}") from error
    if value is not None and not isinstance(value, bool | int | float | str | bytes):
        raise TypeError(f"{type(value).__name__} is not plain data: send a msgspec struct")
    return value
