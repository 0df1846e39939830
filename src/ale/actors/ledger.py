"""Where every rollout of a run is, and the only way to move one: each move is written to the journal, then booked.

What an actor was told by a move that returned is there after SIGKILL; what was cut off before it did not happen.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ale.algorithm.filters import Reason
from ale.data.books import Books, LedgerStatistics, OpenGroup
from ale.data.events import (
    Event,
    Exchange,
    GroupBuffered,
    GroupDropped,
    GroupOpened,
    RolloutDropped,
    RolloutKept,
    RolloutStarted,
    Updated,
)
from ale.messages import Group, Trajectory


class Ledger:
    """`books` is to be read; it changes through the methods alone. `write` is `Journal.append`, or nothing where a
    run is not to be resumed."""

    def __init__(self, books: Books | None = None, write: Callable[[Event], None] = lambda event: None) -> None:
        self.books = books or Books()
        self._write = write

    def book(self, event: Event) -> None:
        self._write(event)
        self.books.apply(event)

    def open(self, task: str, drawn: int) -> OpenGroup:
        """A new group for the task that was drawn from the stream as number `drawn`."""
        name = f"g{self.books.opened + 1}"
        self.book(GroupOpened(group=name, task=task, drawn=drawn))
        return self.books.groups[name]

    def start(self, group: OpenGroup) -> str:
        """The name of a new rollout of the group."""
        rollout = f"{group.id}/{group.started}"
        self.book(RolloutStarted(rollout=rollout))
        return rollout

    def keep(self, trajectory: Trajectory, *, solved: bool, exchange: Exchange | None = None) -> None:
        """A scored rollout becomes a member of its group."""
        self.book(RolloutKept(trajectory=trajectory, solved=solved, exchange=exchange))

    def drop(
        self,
        rollout: str,
        reason: str,
        tokens: int = 0,
        *,
        solved: bool | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.book(RolloutDropped(rollout=rollout, reason=reason, tokens=tokens, solved=solved, exchange=exchange))

    def buffer(self, group: OpenGroup) -> Group:
        """A complete group, as it will be trained on."""
        self.book(GroupBuffered(group=group.id))
        return group.group()

    def drop_group(self, name: str, reason: Reason) -> None:
        self.book(GroupDropped(group=name, reason=str(reason)))

    def train(self, update: Updated) -> None:
        self.book(update)

    def recent_success(self) -> float:
        """The share of the last scored rollouts, filtered ones included, that were solved."""
        recent = self.books.recent
        return sum(recent) / len(recent) if recent else 0.0

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics.of(self.books)

    def at_the_end(self) -> LedgerStatistics:
        """The books of a run that ends here: what still runs is dropped, not forgotten. The ledger stays as it is, so
        that a run that is given more updates goes on with it."""
        now = self.statistics()
        running = {"end_of_run": now.running} if now.running else {}
        return msgspec.structs.replace(now, running=0, dropped=now.dropped | running)
