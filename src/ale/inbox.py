"""An actor's mailbox with its books: what came in, what became of it, what the actor has in hand.

At any time told + asked = handled + answered + failed + abandoned + dropped (by reason) + depth + in_hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from ale.errors import ActorError, ActorStopped, DeadlineExceeded
from ale.mailbox import Ask, Envelope, Mailbox, Wait, allowed, name_of


class Hand(Protocol):
    """Whoever handles messages one at a time and shows the one that it has."""

    current: Envelope | None
    name: str
    """Of its task."""


class ActorStatistics(msgspec.Struct, frozen=True):
    """Counts since the actor's start (restarts included); times in seconds."""

    state: str
    """starting, serving, ending, restarting or ended."""
    depth: int
    capacity: int
    high_water: int
    in_hand: int
    held: int
    """Senders that wait for room."""
    oldest_s: float
    """How long the oldest message in the inbox has waited."""
    told: int
    asked: int
    handled: int
    """Told, and handled without error."""
    answered: int
    failed: int
    """Handling raised: the asker got the error, or the actor crashed."""
    abandoned: int
    """Asked, but the caller was cancelled or out of time before the answer came."""
    dropped: dict[str, int]
    """Not handled to the end, by reason: `stopped` or `crashed`."""
    restarts: int


class Inbox(Mailbox):
    def __init__(self, name: str, capacity: int) -> None:
        self.owner = f"actor {name!r}"
        super().__init__(f"the inbox of {self.owner}", capacity, f"actor {name}")
        self.cause: BaseException | None = None
        """What the actor crashed with, once that has ended it."""
        self.state = "starting"
        self.told = 0
        self.asked = 0
        self.handled = 0
        self.answered = 0
        self.failed = 0
        self.abandoned = 0
        self.dropped: dict[str, int] = {}
        self.restarts = 0
        self.hands: Sequence[Hand] = ()

    def drop(self, envelope: Envelope, reason: str, error: ActorError) -> None:
        """Accounts for a message that nobody will handle; if it was asked, the asker gets `error`."""
        if isinstance(envelope, Ask):
            if envelope.reply.done():
                self.abandoned += 1
                return
            envelope.reply.set_exception(error)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def end(self, reason: str, cause: BaseException | None) -> None:
        """Closes for good: every message left is dropped, every ask left gets `ActorStopped`."""
        self.cause = cause
        self.close()
        while self.items:
            self.drop(self.items.popleft(), reason, self.refusal())

    def refusal(self) -> ActorStopped:
        if self.cause is None:
            return ActorStopped(f"{self.owner} has ended and takes no more messages")
        error = ActorStopped(f"{self.owner} has ended: {type(self.cause).__name__}: {self.cause}")
        error.__cause__ = self.cause
        return error

    def waits(self, now: float) -> Iterator[Wait]:
        yield from super().waits(now)
        for ask, where, on in self._asks():
            waited_s, deadline_s = now - ask.since, allowed(ask.since, ask.deadline)
            yield Wait(name_of(ask.sender), self._what(ask, where), waited_s, deadline_s, on, ask.of)

    def expire(self, now: float) -> float:
        earliest = super().expire(now)
        for ask, where, _ in self._asks():
            if ask.deadline <= now:
                wait = f"{name_of(ask.sender)} waits for {self._what(ask, where)}"
                ask.reply.set_exception(DeadlineExceeded(wait, ask.deadline - ask.since))
            else:
                earliest = min(earliest, ask.deadline)
        return earliest

    def statistics(self, now: float) -> ActorStatistics:
        return ActorStatistics(
            state=self.state,
            depth=len(self.items),
            capacity=self.capacity,
            high_water=self.high_water,
            in_hand=sum(hand.current is not None for hand in self.hands),
            held=len(self.held),
            oldest_s=now - self.items[0].since if self.items else 0.0,
            told=self.told,
            asked=self.asked,
            handled=self.handled,
            answered=self.answered,
            failed=self.failed,
            abandoned=self.abandoned,
            dropped=dict(self.dropped),
            restarts=self.restarts,
        )

    def senders(self) -> Iterator[asyncio.Task[Any]]:
        """The tasks that wait for an answer."""
        return (ask.sender for ask, _, _ in self._asks() if ask.sender is not None)

    def _asks(self) -> Iterator[tuple[Ask, str, str | None]]:
        """Every ask that still has a caller, where it is, and who could answer it."""
        for hand in self.hands:
            if isinstance(hand.current, Ask) and not hand.current.reply.done():
                yield hand.current, "in hand", f"task {hand.name}"
        for envelope in self.items:
            if isinstance(envelope, Ask) and not envelope.reply.done():
                yield envelope, "in its inbox", self.reader

    def _what(self, ask: Ask, where: str) -> str:
        return f"the answer of {self.owner} to {type(ask.message).__name__} ({where})"
