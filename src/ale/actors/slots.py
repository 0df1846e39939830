"""Slots bound how many groups exist between their start and the update that used them.

There are `groups_per_step * (max_lag + 1)`, and `extra_groups` more. A slot is taken before a group starts and given
back when the weights that were trained on it are live, or when the group is dropped. What flows back to the generator
is this state, never a queue, so that no cycle of actors can fill up and stop.

`floor` is the other thing that flows back: no token older than this version will be trained on. It rises when a batch
is taken. Where the live weights are older than that (`max_lag = 0`, an update is being made), no group may start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ale.config import RolloutConfig


def count_slots(c: RolloutConfig) -> int:
    return c.groups_per_step * (c.max_lag + 1) + c.extra_groups


class Slots:
    """`taken` are the groups that hold one from the beginning: those of a run that is resumed."""

    def __init__(self, total: int, taken: Iterable[str] = ()) -> None:
        if total < 1:
            raise ValueError(f"a run needs at least one slot, got {total}")
        self.total = total
        self.floor = 0
        self.raised = asyncio.Event()
        """Set when `floor` has risen; cleared by whoever acts on it."""
        self._live = 0
        self._taken: set[str] = set()
        self._open = asyncio.Event()
        self._open.set()
        for group in taken:
            self.take(group)

    @property
    def taken(self) -> int:
        return len(self._taken)

    async def wait(self) -> None:
        """Returns when a group may start. The caller bounds and names the wait."""
        await self._open.wait()

    def take(self, group: str) -> None:
        if len(self._taken) >= self.total or group in self._taken:
            raise ValueError(f"no slot for group {group}: {len(self._taken)} of {self.total} are taken")
        self._taken.add(group)
        self._look()

    def give_back(self, group: str) -> None:
        self._taken.remove(group)
        self._look()

    def require(self, floor: int) -> None:
        """What comes from now on has to be of this version at least."""
        if floor > self.floor:
            self.floor = floor
            self.raised.set()
            self._look()

    def live(self, version: int) -> None:
        """New rollouts are sampled from this version."""
        self._live = version
        self._look()

    def _look(self) -> None:
        if len(self._taken) < self.total and self._live >= self.floor:
            self._open.set()
        else:
            self._open.clear()
