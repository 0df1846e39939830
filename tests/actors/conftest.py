"""A whole run on the virtual clock: real generator, buffer and trainer; scripted episodes and a learner that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import msgspec
import pytest

from ale.actor import Actor
from ale.actors.episodes import Episodes
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots, count_slots
from ale.actors.stop import Stop
from ale.actors.trainer import Trainer, Update
from ale.bus import Bus
from ale.config import AlgorithmConfig, LearnerConfig, RolloutConfig, RunConfig, TasksConfig
from ale.data.task_stream import TaskStream
from ale.messages import Rollout, TrainStep
from ale.supervisor import Supervisor
from ale.task import Task
from ale.testing.fakes import FakeLearner, FakePolicy, Play, ScriptedEnvs


def tasks(numbers: Iterable[int]) -> Iterator[Task]:
    return (Task(id=f"t{n}", family="odd" if n % 2 else "even") for n in numbers)


def half(rollout: Rollout) -> Play:
    """Every second member of a group succeeds."""
    return Play(reward=float(int(rollout.id.split("/")[1]) % 2), latency_s=1.0)


class Loop:
    """One run. `check` compares the books with what the fakes saw; it runs at every step."""

    def __init__(
        self,
        script: Callable[[Rollout], Play] = half,
        *,
        group_size: int = 2,
        groups_per_step: int = 2,
        max_lag: int = 1,
        on_stale: Any = "discard",
        updates: int = 3,
        baseline: Any = "group_mean",
        shuffle_rewards: bool = False,
        task_count: int | None = None,
        selection: Any = "all",
        load_s: float = 0.0,
        concurrency: int = 64,
        step_deadline_s: float = 1e6,
        batch_deadline_s: float = 1e6,
        extra_members: int = 0,
        extra_groups: int = 0,
        straggler_s: float | None = None,
        straggler_factor: float | None = None,
        **learner: Any,
    ) -> None:
        self.config = RunConfig(
            rollout=RolloutConfig(
                group_size=group_size,
                groups_per_step=groups_per_step,
                max_lag=max_lag,
                on_stale=on_stale,
                concurrency=concurrency,
                batch_deadline_s=batch_deadline_s,
                extra_members=extra_members,
                extra_groups=extra_groups,
                straggler_s=straggler_s,
                straggler_factor=straggler_factor,
            ),
            algorithm=AlgorithmConfig(baseline=baseline, shuffle_rewards=shuffle_rewards),
            learner=LearnerConfig(updates=updates, step_deadline_s=step_deadline_s),
            tasks=TasksConfig(selection=selection),
        )
        self.tasks = TaskStream(tasks(count() if task_count is None else range(task_count)))
        self.ledger = Ledger()
        self.slots = Slots(count_slots(self.config.rollout))
        self.episodes = Episodes(concurrency)
        self.policy = FakePolicy(load_s=load_s)
        self.learner = FakeLearner(self.policy, **learner)
        self.envs = ScriptedEnvs(script, self.policy, concurrency=concurrency, watch=self.check, episodes=self.episodes)
        self.updates: list[Update] = []
        self.stop = Stop()
        self.trained_before = 0  # in earlier lives of the run
        self.under_way: dict[str, Task] = {}
        self.stop_deadline_s = 10.0
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self.before: list[Actor] = []
        """Started before the others."""

    @property
    def pending(self) -> bool:
        """Whether an update was begun whose weights are not live yet."""
        return len(self.learner.steps) > self.policy.version

    async def run(self, during: Callable[[Loop], Any] | None = None) -> Loop:
        """Wired as `pipeline.Run.optimise` does it; `during` runs in the body instead of waiting for the trainer."""
        self.bus = Bus(plain=True)
        async with Supervisor(self.bus, stop_deadline_s=self.stop_deadline_s, on_failure=self.on_failure) as outer:
            for actor in (*self.before, self.envs):
                await outer.start(actor)
            async with Supervisor(self.bus, stop_deadline_s=self.stop_deadline_s, on_failure=self.on_failure) as actors:
                self.buffer = SampleBuffer(
                    self.slots,
                    self.ledger,
                    max_lag=self.config.rollout.max_lag,
                    on_stale=self.config.rollout.on_stale,
                )
                self.generator = Generator(
                    self.config, self.tasks, self.slots, self.ledger, self.episodes, self.under_way
                )
                self.trainer = Trainer(
                    self.config, self.learner, self.policy, self.slots, self.ledger, self._after, self.stop
                )
                for actor in (self.buffer, self.generator, self.trainer):
                    await actors.start(actor)
                if during is not None:
                    await during(self)
                else:
                    await actors.join(self.trainer)
        self.check()
        return self

    async def _after(self, update: Update) -> None:
        self.updates.append(update)
        self.check()

    def check(self) -> None:
        books = self.ledger.statistics()
        assert books.started == books.trained + books.buffered + books.running + sum(books.dropped.values())
        assert min(books.started, books.trained, books.buffered, books.running, *books.dropped.values(), 0) == 0
        assert books.started >= len(self.envs.received) >= self.envs.running
        refused = sum(len(u.metrics.dropped) for u in self.updates)
        live = sum(len(step.samples) for step in self.learner.steps[: len(self.updates)])
        begun = sum(len(step.samples) for step in self.learner.steps)
        assert live - refused <= books.trained - self.trained_before <= begun
        assert books.buffered <= self.slots.taken * self.config.rollout.group_size
        assert 0 <= self.slots.taken <= self.slots.total

    def samples(self) -> list[TrainStep]:
        return self.learner.steps

    def dropped(self) -> dict[str, int]:
        return self.ledger.at_the_end().dropped


@pytest.fixture(scope="session")
def loop() -> type[Loop]:
    return Loop


@pytest.fixture
def with_tasks() -> Callable[[int], list[Task]]:
    return lambda n: list(tasks(range(n)))


@pytest.fixture
def small() -> RunConfig:
    return msgspec.structs.replace(RunConfig(), rollout=RolloutConfig(concurrency=4))
