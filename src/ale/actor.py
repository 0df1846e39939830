"""An actor: a name, a bounded inbox, and the code that handles one message at a time.

    class Counter(Actor):
        async def started(self) -> None:
            self.seen = 0

        async def receive(self, message: Message) -> Total | None:
            match message:
                case Tick():
                    self.seen += 1
                case GetTotal():
                    return Total(value=self.seen)
                case _:
                    await super().receive(message)

An actor starts in a `Supervisor`, which owns its tasks. Errors follow one rule: if somebody asked, the error is
theirs; if nobody asked, the actor crashes and its supervisor decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from ale.bus import Bus
from ale.errors import ActorError
from ale.topic import M, Overflow, Publisher, Subscription
from ale.wire import Message

T = TypeVar("T")


class Host(Protocol):
    """What a supervisor gives to an actor while it lives."""

    bus: Bus

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]: ...

    def publisher(self, type_: type[M]) -> Publisher[M]: ...

    def subscribe(self, type_: type[M], capacity: int, overflow: Overflow) -> Subscription[M]: ...


class Actor:
    """Base of all actors.

    `capacity` bounds the inbox. With `concurrency` 1 the handler owns the actor's state: the next message is taken
    when `receive` has returned. With N, up to N calls of `receive` are open at once and share the state between
    their awaits.
    """

    cancel_abandoned = False
    """Whether `receive` is cancelled when whoever asked has gone: cancelled, or out of time. Else it is finished."""

    def __init__(self, name: str, *, capacity: int, concurrency: int = 1) -> None:
        if concurrency < 1:
            raise ValueError(f"actor {name!r} needs a concurrency of at least 1, not {concurrency}")
        self.name = name
        self.capacity = capacity
        self.concurrency = concurrency
        self.host: Host | None = None

    # What an actor overrides

    async def started(self) -> None:
        """Runs before the first message, and again after each restart: set the state up here.

        What it acquires before it raises, it releases itself; `stopped` runs only for a `started` that returned.
        """

    async def receive(self, message: Message) -> Any:
        """Handles a message. If it was asked, what this returns (or raises) is the answer."""
        raise ActorError(f"actor {self.name!r} does not understand {type(message).__name__}")

    async def run(self) -> None:
        """The loop of a producer, or of the actor that is the clock: when it returns, the actor ends.

        It runs beside `receive` and is cancelled first when the actor is stopped. Loops that `receive` depends on are
        spawned in `started` instead: those outlive the last message.
        """

    async def stopped(self) -> None:
        """Runs after the last message, also after a crash: release what `started` acquired."""

    # What an actor uses

    @property
    def bus(self) -> Bus:
        return self._host().bus

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Runs `work` beside the handler. Its error crashes the actor; it is cancelled when the actor ends."""
        return self._host().spawn(work, name)

    def publisher(self, type_: type[M]) -> Publisher[M]:
        """The actor's publisher of `type_`: opened at the first call, kept through restarts, closed at its end."""
        return self._host().publisher(type_)

    def subscribe(self, type_: type[M], *, capacity: int, overflow: Overflow) -> Subscription[M]:
        """The actor's subscription to `type_`: opened at the first call, kept, with what is in it, through restarts.

        Call it in `started`, so that nothing published after the actor's start is missed.
        """
        return self._host().subscribe(type_, capacity, overflow)

    def _host(self) -> Host:
        if self.host is None:
            raise ActorError(f"actor {self.name!r} is not started: use `await supervisor.start(actor)`")
        return self.host
