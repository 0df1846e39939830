"""Slots bound how many groups exist between their start and the update that used them.

There are `groups_per_step * (max_lag + 1)`. A slot is taken before a group starts and given back when the weights that
were trained on it are live, or when the group is dropped. What flows back to the generator is this state, never a
queue, so that no cycle of actors can fill up and stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Slots:
    """`taken` are the groups that hold one from the beginning: those of a run that is resumed."""

    def __init__(self, total: int, taken: Iterable[str] = ()) -> None:
        if total < 1:
            raise ValueError(f"a run needs at least one slot, got {total}")
        self.total = total
        self._taken: set[str] = set()
        self._free = asyncio.Event()
        self._free.set()
        for group in taken:
            self.take(group)

    @property
    def taken(self) -> int:
        return len(self._taken)

    async def wait(self) -> None:
        """Returns when a slot is free. The caller bounds and names the wait."""
        await self._free.wait()

    def take(self, group: str) -> None:
        if len(self._taken) >= self.total or group in self._taken:
            raise ValueError(f"no slot for group {group}: {len(self._taken)} of {self.total} are taken")
        self._taken.add(group)
        if len(self._taken) == self.total:
            self._free.clear()

    def give_back(self, group: str) -> None:
        self._taken.remove(group)
        self._free.set()
