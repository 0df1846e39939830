"""The books of a run: where every rollout is, and all else that its controller has to know to go on.

At any time: started = trained + buffered + running + dropped, by identity. A rollout moves one way,
running -> finished in its group -> buffered -> trained, or is dropped on the way with a reason. Any other move is a bug
and raises.

Books change through `apply` alone, so they are a function of the journal: those of a resumed run are made by the same
code from the same events as those of the run that was cut off.
"""

from __future__ import annotations

import msgspec

from ale.algorithm.selection import Outcomes
from ale.data.events import (
    Evaluated,
    Event,
    Exchange,
    FileSizes,
    GroupBuffered,
    GroupDropped,
    GroupOpened,
    Recorded,
    Resumed,
    RolloutDropped,
    RolloutKept,
    RolloutStarted,
    TasksShown,
    Updated,
)
from ale.messages import Demonstration, Group, Trajectory
from ale.progress import Rate
from ale.task import Task

# The share of successes is that of so many rollouts, the last ones that were scored.
_RECENT = 256
# How long an episode takes is judged by so many.
_DURATIONS = 64


def kind_of(task: Task | Trajectory) -> str:
    return f"{task.family}/{task.level}"


class OpenGroup(msgspec.Struct, kw_only=True):
    """A group that is neither trained on nor dropped: `OpenGroup(id="g3", task="copy-7", drawn=415, started=9,
    running=["g3/8"], members=[Trajectory(...), ...], failed={"sandbox_failure": 1})`."""

    id: str
    task: str
    drawn: int
    started: int = 0
    running: list[str] = []
    members: list[Trajectory] = []
    """Finished and scored, in the order of their ends."""
    failed: dict[str, int] = {}
    buffered: bool = False

    def group(self) -> Group:
        """What is trained on: members in the order of their starts."""
        members = sorted(self.members, key=lambda t: int(t.id.rpartition("/")[2]))
        return Group(id=self.id, task=self.task, trajectories=tuple(members))


class Trained(msgspec.Struct, frozen=True):
    """One update and what it was made of: kept until a checkpoint holds the weights that came of it."""

    event: Updated
    groups: tuple[Group, ...]


class Books(msgspec.Struct, kw_only=True):
    drawn: int = 0
    """Tasks taken off the stream: its cursor."""
    demonstrations: tuple[Demonstration, ...] | None = None
    """None before they are made, empty when the warm start is over."""
    looked_at: int = 0
    """How many of the tasks that were drawn last tell the warm start when to end."""
    warm_steps: int = 0
    """Supervised updates in the weights of the last checkpoint."""
    warm: bool = False
    """The warm start is over and the learner optimises the policy."""
    groups: dict[str, OpenGroup] = {}
    """In the order of their starts."""
    opened: int = 0
    started: int = 0
    trained: int = 0
    dropped: dict[str, int] = {}
    dropped_tokens: dict[str, int] = {}
    recent: list[bool] = []
    durations: list[float] = []
    """How long the last episodes that were kept took, in seconds."""
    outcomes: dict[str, Outcomes] = {}
    """By kind of task, which is `family/level`."""
    pool: list[float] = []
    """Earned rewards that wait to be given to another rollout (`algorithm.shuffle_rewards`)."""
    exchanges: int = 0
    updates: int = 0
    since: list[Trained] = []
    """Updates that no checkpoint holds yet, oldest first."""
    recorded: int = 0
    """The last update whose lines are in the run's files."""
    sizes: FileSizes = FileSizes()
    rates: dict[str, Rate] = {}
    """Results of evaluations, by `name@update`."""
    tokens: int = 0
    training_s: float = 0.0
    max_lag: int = 0

    @property
    def running(self) -> int:
        """Rollouts under way, and those that are finished but whose group is not."""
        return sum(len(g.running) + len(g.members) for g in self.groups.values() if not g.buffered)

    @property
    def buffered(self) -> int:
        return sum(len(g.members) for g in self.groups.values() if g.buffered)

    def apply(self, event: Event) -> None:
        """Raises `ValueError` or `KeyError` for a move that is not allowed, and then changes nothing."""
        match event:
            case TasksShown(drawn=drawn, demonstrations=demonstrations, looked_at=looked_at):
                self.drawn, self.demonstrations, self.looked_at = drawn, demonstrations, looked_at
            case GroupOpened(group=name, task=task, drawn=drawn):
                if name in self.groups or drawn <= self.drawn:
                    raise ValueError(f"group {name} of task {drawn} was opened already; the stream is at {self.drawn}")
                self.groups[name] = OpenGroup(id=name, task=task, drawn=drawn)
                self.drawn = drawn
                self.opened += 1
            case RolloutStarted(rollout=rollout):
                group = self._group_of(rollout)
                if rollout != f"{group.id}/{group.started}" or group.buffered:
                    raise ValueError(f"rollout {rollout} was started already, or its group is full")
                group.started += 1
                group.running.append(rollout)
                self.started += 1
            case RolloutKept(trajectory=trajectory, solved=solved, exchange=exchange):
                group = self._ended(trajectory.id, solved, exchange)
                group.members.append(trajectory)
                self.durations = [*self.durations[1 - _DURATIONS :], trajectory.duration_s]
                kind = kind_of(trajectory)
                self.outcomes[kind] = self.outcomes.get(kind, Outcomes()).after(solved)
            case RolloutDropped(rollout=rollout, reason=reason, tokens=tokens, solved=solved, exchange=exchange):
                group = self._ended(rollout, solved, exchange)
                group.failed[reason] = group.failed.get(reason, 0) + 1
                self._drop(reason, tokens)
            case GroupBuffered(group=name):
                group = self._complete(name)
                group.buffered = True
            case GroupDropped(group=name, reason=reason):
                self._complete(name, buffered=None)
                for trajectory in self.groups.pop(name).members:
                    self._drop(reason, trajectory.action_tokens)
            case Updated():
                self._train(event)
            case Recorded(update=update, sizes=sizes):
                self.recorded, self.sizes = update, sizes
            case Evaluated(name=name, update=update, rate=rate, sizes=sizes):
                self.rates[f"{name}@{update}"], self.sizes = rate, sizes
            case Resumed():
                pass

    def _group_of(self, rollout: str) -> OpenGroup:
        return self.groups[rollout.rpartition("/")[0]]

    def _ended(self, rollout: str, solved: bool | None, exchange: Exchange | None) -> OpenGroup:
        group = self._group_of(rollout)
        group.running.remove(rollout)
        if solved is not None:
            self.recent = [*self.recent[1 - _RECENT :], solved]
        if exchange is not None:
            self.pool[exchange.place : exchange.place + 1] = [exchange.earned]
            self.exchanges += 1
        return group

    def _complete(self, name: str, *, buffered: bool | None = False) -> OpenGroup:
        """The group, none of whose rollouts runs. `buffered` None: it does not matter whether it is."""
        group = self.groups[name]
        if group.running or (buffered is not None and group.buffered is not buffered):
            raise ValueError(f"group {name} has {len(group.running)} running rollouts; buffered: {group.buffered}")
        return group

    def _drop(self, reason: str, tokens: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.dropped_tokens[reason] = self.dropped_tokens.get(reason, 0) + tokens

    def _train(self, event: Updated) -> None:
        if event.number != self.updates + 1:
            raise ValueError(f"update {event.number} cannot follow update {self.updates}")
        opened = [self._complete(name, buffered=True) for name in event.groups]
        groups = tuple(g.group() for g in opened)
        for group in groups:
            del self.groups[group.id]
            for t in group.trajectories:
                self.tokens += t.action_tokens
                if t.id in event.metrics.dropped:
                    self._drop(event.metrics.dropped[t.id], t.action_tokens)
                else:
                    self.trained += 1
        self.updates = event.number
        self.since.append(Trained(event, groups))
        self.training_s += event.wait_s + event.step_s
        self.max_lag = max(self.max_lag, event.lag)


class LedgerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """`LedgerStatistics(started=64, running=8, buffered=16, trained=32, dropped={"zero_advantage": 8}, ...)`."""

    started: int
    running: int
    buffered: int
    trained: int
    dropped: dict[str, int]
    dropped_tokens: dict[str, float]
    """Mean action tokens of what was dropped, by reason: throwing away what is late throws away what is long."""

    @property
    def lost(self) -> int:
        return self.started - self.trained - self.buffered - self.running - sum(self.dropped.values())

    @classmethod
    def of(cls, books: Books) -> LedgerStatistics:
        return cls(
            started=books.started,
            running=books.running,
            buffered=books.buffered,
            trained=books.trained,
            dropped=dict(books.dropped),
            dropped_tokens={k: books.dropped_tokens[k] / n for k, n in books.dropped.items()},
        )
