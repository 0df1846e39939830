"""Publish and subscribe by message type; the end of data is ownership.

A topic is one message type (subclasses are topics of their own). While a publisher is held there may be more to come;
when the last one closes, every subscription drains and its `async for` ends. There are no sentinels.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from enum import Enum
from math import inf
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from ale.errors import ActorError, ActorStopped, MailboxClosed
from ale.mailbox import Envelope, Mailbox
from ale.wire import Message

M = TypeVar("M", bound=Message)


class Overflow(Enum):
    """What happens to a message that finds its subscription full."""

    HOLD = "hold"
    """The publisher waits, with its deadline, until the reader has made room."""
    DROP_OLDEST = "drop_oldest"
    """The oldest unread message makes room and is counted as dropped."""
    DROP_NEWEST = "drop_newest"
    """The new message is counted as dropped."""


class Subscription(Generic[M]):
    """The messages of one type, bounded; read with `async for`, left with `with` or `close()`."""

    def __init__(self, topic: Topic, reader: str, capacity: int, overflow: Overflow) -> None:
        self.topic = topic
        self.reader = reader
        self.overflow = overflow
        self.received = 0
        self.dropped = 0
        self.mailbox = Mailbox(f"the subscription of {reader!r} to {topic.name}", capacity, f"actor {reader}")
        self._loop = asyncio.get_running_loop()

    async def get(self, *, deadline_s: float = inf) -> M:
        """The next message. Raises `MailboxClosed` at the end of data and `DeadlineExceeded`."""
        mailbox = self.mailbox
        since = self._loop.time()
        while not mailbox.items:
            if mailbox.closed:
                raise MailboxClosed(f"{mailbox.place} has ended: the last publisher has gone")
            self.topic.watch(since + deadline_s)
            await mailbox.wait(since, since + deadline_s)
        return cast(M, mailbox.take().message)

    def offer(self, envelope: Envelope) -> None:
        """Takes a published message without waiting, by the overflow policy."""
        if not self.mailbox.offer(envelope):
            self.dropped += 1
            if self.overflow is Overflow.DROP_NEWEST:
                return
            self.mailbox.take()
            self.mailbox.offer(envelope)
        self.received += 1

    def accept(self, envelope: Envelope) -> None:
        """Fills a slot that the publisher has reserved."""
        self.received += 1
        self.mailbox.put(envelope)

    def close(self) -> None:
        """The reader leaves: what it has not read is counted as dropped, publishers that it held go on."""
        self.dropped += len(self.mailbox.items)
        self.mailbox.close()
        self.mailbox.items.clear()
        self.topic.subscriptions.pop(self, None)

    def __aiter__(self) -> AsyncIterator[M]:
        return self

    async def __anext__(self) -> M:
        try:
            return await self.get()
        except MailboxClosed:
            raise StopAsyncIteration from None

    def __enter__(self) -> Subscription[M]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Publisher(Generic[M]):
    """The right to publish one type of message, and the promise that more may come: hold it with `with`."""

    def __init__(self, topic: Topic, plain: Callable[[Any], Any] | None) -> None:
        self._topic = topic
        self._plain = plain
        self._closed = False
        self._loop = asyncio.get_running_loop()
        topic.open(self)

    async def publish(self, message: M, *, deadline_s: float) -> None:
        """Gives `message` to every subscription there is now: to all of them, or (cancelled, too late) to none.

        Raises `DeadlineExceeded` when a subscription that holds its publishers stays full.
        """
        topic = self._topic
        self._check_open()
        if type(message) is not topic.type:
            raise TypeError(f"a publisher of {topic.name} was given a {type(message).__name__}")
        if self._plain is not None:
            message = self._plain(message)
        since = self._loop.time()
        deadline = since + deadline_s
        reserved: list[Subscription[Any]] = []
        readers = tuple(topic.subscriptions)
        try:
            for reader in readers:
                if reader.overflow is not Overflow.HOLD:
                    continue
                topic.watch(deadline)
                try:
                    await reader.mailbox.reserve(since, deadline)
                except ActorStopped:
                    continue  # the reader left
                reserved.append(reader)
            self._check_open()
        except BaseException:
            for reader in reserved:
                reader.mailbox.release()
            raise
        # No await from here on: nobody can be cancelled between the first delivery and the last.
        topic.published += 1
        envelope = Envelope(message, since)
        for reader in readers:
            if reader.mailbox.closed:
                continue
            if reader.overflow is Overflow.HOLD:
                reader.accept(envelope)
            else:
                reader.offer(envelope)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._topic.end(self)

    def _check_open(self) -> None:
        if self._closed:
            raise ActorError(f"this publisher of {self._topic.name} is closed")

    def __enter__(self) -> Publisher[M]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Topic:
    """Everything the bus knows of one message type. `watch(deadline)` asks the bus to sweep by then."""

    def __init__(self, type_: type[Message], watch: Callable[[float], None]) -> None:
        self.type = type_
        self.name = type_.__name__
        self.watch = watch
        self.published = 0
        # A dict keeps the order: publishers reserve in the same order, so two of them cannot hold each other up.
        self.subscriptions: dict[Subscription[Any], None] = {}
        self._publishers: set[Publisher[Any]] = set()
        self._ended = False

    def subscribe(self, reader: str, capacity: int, overflow: Overflow) -> Subscription[Any]:
        subscription: Subscription[Any] = Subscription(self, reader, capacity, overflow)
        if self._ended:
            subscription.mailbox.close()  # who comes after the end of data does not wait for it
        self.subscriptions[subscription] = None
        return subscription

    def open(self, publisher: Publisher[Any]) -> None:
        self._publishers.add(publisher)
        self._ended = False

    def end(self, publisher: Publisher[Any]) -> None:
        self._publishers.discard(publisher)
        if not self._publishers:
            self._ended = True
            for subscription in self.subscriptions:
                subscription.mailbox.close()
