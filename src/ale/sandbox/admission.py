"""Admission: who may start a sandbox now. A bounded queue, fair between runs, with a deadline for everyone in it.

Runs (the label up to its first "/") take turns; within a run it is first come, first served. Whoever's turn it is waits
until it fits, and nobody overtakes: a large sandbox is not starved by many small ones.
"""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from ale.errors import DeadlineExceeded, SandboxBusy
from ale.sandbox.port import SandboxSpec


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What all sandboxes together may be promised; their limits are counted, not their use.

    Worked example: `Capacity(count=64, memory_mb=16384)`. None: not counted.
    """

    count: int = 256
    memory_mb: int | None = None
    pids: int | None = None
    cpus: float | None = None
    """A sandbox without a limit of its own counts as one."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"Capacity.{name} must be positive, got {value}")


class Cost(msgspec.Struct, frozen=True):
    count: int
    memory_mb: int
    pids: int
    cpus: float

    @classmethod
    def of(cls, spec: SandboxSpec) -> Cost:
        limits = spec.limits
        return cls(1, limits.memory_mb, limits.pids, limits.cpus if limits.cpus is not None else 1.0)


class _Ticket:
    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Admission:
    def __init__(self, capacity: Capacity, *, max_waiting: int) -> None:
        self.capacity = capacity
        self._max_waiting = max_waiting
        self._used = dict.fromkeys(Cost.__struct_fields__, 0.0)
        self._queues: dict[str, deque[_Ticket]] = {}  # by run, in the order of their turns
        self.granted = self.refused = self.expired = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def used(self) -> Cost:
        return Cost(*(type_(self._used[name]) for name, type_ in zip(self._used, (int, int, int, float), strict=True)))

    def fits(self, cost: Cost) -> bool:
        """Whether there is room for it now."""
        return all(
            limit is None or self._used[name] + getattr(cost, name) <= limit
            for name, limit in ((name, getattr(self.capacity, name)) for name in self._used)
        )

    def take(self, cost: Cost) -> None:
        for name in self._used:
            self._used[name] += getattr(cost, name)

    def give_back(self, cost: Cost) -> None:
        for name in self._used:
            self._used[name] -= getattr(cost, name)
        self._grant()

    async def admit(self, run: str, cost: Cost, deadline_s: float) -> None:
        """Takes `cost`, when its turn has come. Raises SandboxBusy at once when too many wait already or it can never
        fit, DeadlineExceeded when its turn did not come in time."""
        for name in self._used:
            limit = getattr(self.capacity, name)
            if limit is not None and getattr(cost, name) > limit:
                self.refused += 1
                raise SandboxBusy(f"a sandbox with {name} {getattr(cost, name)} never fits a pool of {limit}")
        if self.waiting >= self._max_waiting:
            self.refused += 1
            raise SandboxBusy(f"{self.waiting} wait for a sandbox already, at most {self._max_waiting} may")
        ticket = _Ticket(cost)
        self._queues.setdefault(run, deque()).append(ticket)
        self._grant()
        try:
            await asyncio.wait([ticket.granted], timeout=deadline_s)
        except asyncio.CancelledError:
            self._withdraw(run, ticket)
            raise
        if not ticket.granted.done():
            self._withdraw(run, ticket)
            self.expired += 1
            raise DeadlineExceeded("a place for a sandbox in the pool", deadline_s)

    def _withdraw(self, run: str, ticket: _Ticket) -> None:
        if ticket.granted.done():  # in the same moment
            self.give_back(ticket.cost)
            return
        self._queues[run].remove(ticket)
        if not self._queues[run]:
            del self._queues[run]
        self._grant()  # the one behind may be smaller

    def _grant(self) -> None:
        while self._queues:
            run = next(iter(self._queues))
            if not self.fits(self._queues[run][0].cost):
                return
            queue = self._queues.pop(run)
            ticket = queue.popleft()
            if queue:
                self._queues[run] = queue  # behind the others
            self.take(ticket.cost)
            self.granted += 1
            ticket.granted.set_result(None)
