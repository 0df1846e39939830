"""What a run's journal can say, in the order in which it comes about. `books.py` says what each of them means.

Began  TasksShown  Evaluated  [GroupOpened  RolloutStarted  RolloutKept | RolloutDropped  GroupBuffered | GroupDropped
Updated  Recorded]  Evaluated  Resumed
"""

from __future__ import annotations

import msgspec

from ale.messages import Demonstration, StepMetrics, Trajectory
from ale.progress import Rate


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class FileSizes(msgspec.Struct, frozen=True, kw_only=True):
    """`FileSizes(metrics=812, trajectories=40960)`: bytes of the files whose lines the journal vouches for."""

    metrics: int = 0
    trajectories: int = 0


class Exchange(msgspec.Struct, frozen=True, array_like=True):
    """`Exchange(place=7, earned=1.0)`: what a rollout earned took this place in the pool of shuffled rewards."""

    place: int
    earned: float


class Began(_Event, frozen=True):
    """`Began(format=1, ale="0.1.0")`: the first record of a run, and the format of those that follow (`journal.py`)."""

    format: int
    ale: str


class TasksShown(_Event, frozen=True):
    """`TasksShown(drawn=476, demonstrations=(...), looked_at=64)`: demonstrations of tasks of the stream, and how many
    tasks were drawn after them, up to the 476th, for the warm start to look at."""

    drawn: int
    demonstrations: tuple[Demonstration, ...]
    looked_at: int = 0


class GroupOpened(_Event, frozen=True):
    """`GroupOpened(group="g3", task="copy-7", drawn=415)`: the group rolls out the 415th task of the stream."""

    group: str
    task: str
    drawn: int


class RolloutStarted(_Event, frozen=True):
    """`RolloutStarted(rollout="g3/1")`"""

    rollout: str


class RolloutKept(_Event, frozen=True):
    """`RolloutKept(trajectory=Trajectory(id="g3/1", ...))`: finished, scored, and waiting for its group."""

    trajectory: Trajectory
    solved: bool
    exchange: Exchange | None = None


class RolloutDropped(_Event, frozen=True):
    """`RolloutDropped(rollout="g3/1", reason="sandbox_failure", tokens=31)`. `solved` None: it was not scored."""

    rollout: str
    reason: str
    tokens: int = 0
    solved: bool | None = None
    exchange: Exchange | None = None


class GroupBuffered(_Event, frozen=True):
    """`GroupBuffered(group="g3")`: every member has finished; the group may be trained on."""

    group: str


class GroupDropped(_Event, frozen=True):
    """`GroupDropped(group="g3", reason="zero_advantage")`: with every member that it still had."""

    group: str
    reason: str


class Updated(_Event, frozen=True):
    """`Updated(number=12, groups=("g3", "g4"), metrics=StepMetrics(...), lag=1, ...)`: these groups were trained on.

    Written before any engine gets the weights: a token of this version implies this record.
    """

    number: int
    groups: tuple[str, ...]
    metrics: StepMetrics
    lag: int
    wait_s: float
    step_s: float


class Recorded(_Event, frozen=True):
    """`Recorded(update=12, sizes=FileSizes(...))`: the lines of this update are in the run's files."""

    update: int
    sizes: FileSizes


class Evaluated(_Event, frozen=True):
    """`Evaluated(name="heldout_before", update=0, rate=Rate(...), sizes=FileSizes(...))`"""

    name: str
    update: int
    rate: Rate
    sizes: FileSizes


class Resumed(_Event, frozen=True):
    """`Resumed(changed={"learner.updates": "140 -> 200"}, format=1, ale="0.1.0")`: another life begins, in which the
    rollouts that were under way run again from their start."""

    changed: dict[str, str] = {}
    format: int = 0
    ale: str = ""


Event = (
    Began
    | TasksShown
    | GroupOpened
    | RolloutStarted
    | RolloutKept
    | RolloutDropped
    | GroupBuffered
    | GroupDropped
    | Updated
    | Recorded
    | Evaluated
    | Resumed
)
