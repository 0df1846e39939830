"""An actor's mailbox with its books: what came in, what became of it, what the actor has in hand.

At any time told + asked = handled + answered + failed + abandoned + dropped (by reason) + depth + in_hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from ale.errors import ActorError, DeadlineExceeded
from ale.mailbox import Envelope, Mailbox, Wait, allowed, name_of


class Hand(Protocol):
    """Whoever handles messages one at a time and shows the one that it has."""

    current: Envelope | None


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
        super().__init__(f"actor {name!r}", capacity)
        self.state = "starting"
        self.told = 0
        self.asked = 0
        self.handled = 0
        self.answered = 0
        self.failed = 0
        self.abandoned = 0
        self.dropped: dict[str, int] = {}
        self.restarts = 0
        self.hands: list[Hand] = []

    def drop(self, envelope: Envelope, reason: str, error: ActorError) -> None:
        """Accounts for a message that nobody will handle; if it was asked, the asker gets `error`."""
        reply = envelope.reply
        if reply is not None and reply.done():
            self.abandoned += 1
            return
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if reply is not None:
            reply.set_exception(error)

    def end(self, reason: str, cause: BaseException | None) -> None:
        """Closes for good: every message left is dropped, every ask left gets `ActorStopped`."""
        self.close(cause)
        while self.items:
            self.drop(self.items.popleft(), reason, self.refusal())

    def waits(self, now: float) -> Iterator[Wait]:
        yield from super().waits(now)
        for envelope, where in self._asks():
            yield Wait(
                name_of(envelope.sender),
                self._asked_for(envelope, where),
                now - envelope.since,
                allowed(envelope.since, envelope.deadline),
            )

    def expire(self, now: float) -> float:
        earliest = super().expire(now)
        for envelope, where in self._asks():
            reply = envelope.reply
            if envelope.deadline <= now and reply is not None:
                wait = f"{name_of(envelope.sender)} waits for {self._asked_for(envelope, where)}"
                reply.set_exception(DeadlineExceeded(wait, envelope.deadline - envelope.since))
            else:
                earliest = min(earliest, envelope.deadline)
        return earliest

    def statistics(self, now: float) -> ActorStatistics:
        return ActorStatistics(
            state=self.state,
            depth=len(self.items),
            capacity=self.capacity,
            high_water=self.high_water,
            in_hand=sum(hand.current is not None for hand in self.hands),
            held=self.held,
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

    def _asks(self) -> Iterator[tuple[Envelope, str]]:
        """Every ask that still has a caller, and where it is."""
        for hand in self.hands:
            if hand.current is not None and _has_caller(hand.current):
                yield hand.current, "in hand"
        for envelope in self.items:
            if _has_caller(envelope):
                yield envelope, "in its inbox"

    def _asked_for(self, envelope: Envelope, where: str) -> str:
        return f"the answer of {self.owner} to {type(envelope.message).__name__} ({where})"


def _has_caller(envelope: Envelope) -> bool:
    return envelope.reply is not None and not envelope.reply.done()
