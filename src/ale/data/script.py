"""What the journal of a recorded run says that comes next: a replay is held against it, event by event."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from ale.data.books import Books
from ale.data.compare import first_difference
from ale.data.events import Began, Evaluated, Event, Recorded, Resumed, RolloutDropped, TasksShown, Updated
from ale.errors import Diverged
from ale.messages import Trajectory

TOLERANCE = 1e-6
"""Of a loss and of a gradient norm, absolutely or in proportion."""
# What the clock says, and what the recorded run did beside its loop.
_CLOCKED = frozenset({"duration_s", "wait_s", "step_s", "values"})
# Which of its two deadlines an episode ran into, only the clock knows.
_STRAGGLER, _TIMEOUT = "straggler", "episode_timeout"
_BESIDE = (Began, TasksShown, Recorded, Evaluated, Resumed)


class LifeOver(Exception):
    """The recorded life was ended before it had booked this."""


class Script:
    """What the journal says that comes next. `write` is what a ledger calls before each move.

    `read` gives the events from the first on, each time it is called.
    """

    def __init__(self, read: Callable[[], Iterable[Event]]) -> None:
        self._last = _last_updates(read())
        self._events = enumerate(read(), start=1)
        self._next: tuple[int, Event] | None = next(self._events, None)
        self.updates = self.rollouts = 0
        self.loss_apart = 0.0
        self.diverged: str | None = None
        self.over = False

    def catch_up(self, books: Books) -> Books:
        """Books what is beside the loop, up to where the loop of the next life begins."""
        self.over = False
        while self._next is not None and isinstance(self._next[1], _BESIDE):
            books.apply(self._next[1])
            self._step()
        return books

    def makes(self, update: int, life: int) -> bool:
        """Whether this update was made and booked in this life."""
        return update <= self._last.get(life, 0)

    def write(self, event: Event) -> None:
        while self._next is not None and isinstance(self._next[1], Recorded | Evaluated):
            self._step()
        if self._next is None or isinstance(self._next[1], _BESIDE) or self.over:
            self.over = True
            raise LifeOver
        number, recorded = self._next
        self._compare(number, recorded, event)
        self._step()

    def check_through(self) -> None:
        """Raises `Diverged` where the journal goes on."""
        if self._next is not None:
            number, event = self._next
            raise Diverged(f"event {number} of the journal, {_named(event)}, did not come about in the replay")

    def _step(self) -> None:
        self._next = next(self._events, None)

    def _compare(self, number: int, recorded: Event, event: Event) -> None:
        if isinstance(recorded, Updated) and isinstance(event, Updated):
            self.loss_apart = max(self.loss_apart, abs(recorded.metrics.loss - event.metrics.loss))
            self.updates += 1
        self.rollouts += type(event).__name__ in ("RolloutKept", "RolloutDropped")
        if isinstance(recorded, RolloutDropped) and recorded.reason == _STRAGGLER:
            recorded = msgspec.structs.replace(recorded, reason=_TIMEOUT)
        if type(recorded) is not type(event):
            said: str | None = f"recorded is {_named(recorded)}, replayed is {_named(event)}"
        else:
            said = first_difference(recorded, event, tolerance=TOLERANCE, skip=_CLOCKED)
            said = None if said is None else f"{_named(recorded)}: {said}"
        if said is not None:
            self.over = True  # what follows from the first difference must not hide it
            self.diverged = f"event {number} of the journal, recorded and replayed: {said}"
            raise Diverged(self.diverged)


def _last_updates(events: Iterable[Event]) -> dict[int, int]:
    """The last update that was booked by the end of each life."""
    life, last = 1, {1: 0}
    for event in events:
        if isinstance(event, Resumed):
            life += 1
            last[life] = last[life - 1]
        elif isinstance(event, Updated):
            last[life] = event.number
    return last


def _named(event: Event) -> str:
    """`"RolloutKept g3/1"`"""
    for field in ("rollout", "group", "number"):
        if hasattr(event, field):
            return f"{type(event).__name__} {getattr(event, field)}"
    trajectory: Trajectory | None = getattr(event, "trajectory", None)
    return type(event).__name__ if trajectory is None else f"{type(event).__name__} {trajectory.id}"
