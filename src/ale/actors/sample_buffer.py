"""The sample buffer: finished groups wait here until the trainer takes a batch, and staleness is enforced here.

At the moment a batch is taken, `version being trained - oldest version in the sample <= max_lag` holds for every
trajectory in it. What is older is discarded and its slot given back ("discard"), or cannot become older because groups
are taken in the order in which they started ("wait"): with `groups_per_step * (max_lag + 1)` slots, a group is taken at
the latest `max_lag` updates after it began.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from ale.actor import Actor
from ale.actors.ledger import Ledger
from ale.actors.slots import Slots
from ale.algorithm.filters import Reason, stale_reason
from ale.errors import ActorStopped, ConfigError
from ale.messages import Batch, Group, GroupEnded, GroupStarted, TakeBatch, TasksEnded
from ale.waiting import named
from ale.wire import Message

logger = logging.getLogger(__name__)


class SampleBuffer(Actor):
    """Groups arrive while a batch is being waited for, hence a concurrency of 2."""

    def __init__(
        self, slots: Slots, ledger: Ledger, *, max_lag: int, on_stale: Literal["discard", "wait"] = "discard"
    ) -> None:
        super().__init__("buffer", capacity=4 * slots.total, concurrency=2)
        self._slots = slots
        self._ledger = ledger
        self._max_lag = max_lag
        self._on_stale = on_stale
        # In order of start; None: still running. A resumed run begins with what its ledger shows.
        self._groups: dict[str, Group | None] = {
            name: group.group() if group.buffered else None for name, group in ledger.books.groups.items()
        }
        self._ended: TasksEnded | None = None
        self._stopped = False
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Nothing, until the buffer is stopped: then a batch that is still waited for will never be full."""
        try:
            with named("its end", idle=True):
                await asyncio.Event().wait()
        finally:
            self._stopped = True
            self._changed.set()

    async def receive(self, message: Message) -> Batch | None:
        match message:
            case GroupStarted(group=name):
                self._groups[name] = None
            case Group(id=name):
                self._groups[name] = message
                self._changed.set()
            case GroupEnded(group=name):
                del self._groups[name]
                self._changed.set()
            case TasksEnded():
                self._ended = message
                self._changed.set()
            case TakeBatch(version=version, groups=wanted):
                return await self._take(version, wanted)
            case _:
                await super().receive(message)
        return None

    async def _take(self, version: int, wanted: int) -> Batch:
        while True:
            self._changed.clear()
            self._discard_stale(version)
            ready = self._ready(wanted)
            if len(ready) >= wanted:
                break
            if self._stopped:
                raise ActorStopped(f"the buffer was stopped while version {version} waited for {wanted} groups")
            if self._ended is not None:
                raise ConfigError(
                    f"The tasks ended after {self._ended.started} groups: {wanted} are needed to train version "
                    f"{version} on and {len(ready)} are left. Lower learner.updates or give more tasks."
                )
            what = f"{wanted} groups to train version {version} on: {len(ready)} are ready"
            async with self.bus.waiting(what, on="actor generator"):
                await self._changed.wait()
        groups = tuple(self._groups.pop(g.id) for g in ready)
        if self._on_stale == "discard":
            self._slots.require(version + 1 - self._max_lag)  # of what the next batch is made of
        return Batch(groups=tuple(g for g in groups if g is not None))

    def _ready(self, wanted: int) -> list[Group]:
        if self._on_stale == "wait":
            first = list(self._groups.values())[:wanted]
            return [g for g in first if g is not None]
        return [g for g in self._groups.values() if g is not None][:wanted]

    def _discard_stale(self, version: int) -> None:
        for name, group in list(self._groups.items()):
            if group is None or stale_reason(version, group.oldest_version, self._max_lag) is None:
                continue
            if self._on_stale == "wait":
                raise AssertionError(f"group {name} is older than {self._max_lag} updates although taken in order")
            logger.info("group %s is too old: version %d, training %d", name, group.oldest_version, version)
            self._ledger.drop_group(name, Reason.STALE)
            del self._groups[name]
            self._slots.give_back(name)
