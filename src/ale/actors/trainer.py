"""The trainer: the clock of a run. Take a batch, update, hand the new weights to the policy, give the slots back."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from ale.actor import Actor
from ale.actors.ledger import Ledger
from ale.actors.multiplexer import Devices
from ale.actors.slots import Slots
from ale.actors.stop import Stop
from ale.algorithm.advantages import advantages
from ale.config import RunConfig
from ale.data.books import Trained
from ale.data.events import Updated
from ale.errors import LearnerError
from ale.messages import Batch, Group, Sample, StepMetrics, TakeBatch, TrainStep, Trajectory
from ale.policy.port import Policy
from ale.waiting import progressed
from ale.wire import Reply, Request

logger = logging.getLogger(__name__)


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """`Update(number=3, batch=Batch(...), metrics=StepMetrics(...), lag=1, ...)`: one turn of the clock.

    `values` is the line of metrics.jsonl, once the pipeline has written it.
    """

    number: int
    batch: Batch
    metrics: StepMetrics
    lag: int
    wait_s: float
    step_s: float
    sync_s: float
    values: dict[str, float] = {}

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """What was trained on, group after group."""
        return tuple(t for group in self.batch.groups for t in group.trajectories)

    @classmethod
    def of(cls, trained: Trained, sync_s: float = 0.0) -> Update:
        e = trained.event
        return cls(
            number=e.number,
            batch=Batch(groups=trained.groups),
            metrics=e.metrics,
            lag=e.lag,
            wait_s=e.wait_s,
            step_s=e.step_s,
            sync_s=sync_s,
        )


class Learner(Protocol):
    """What the trainer needs of the learner's process."""

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply: ...


class Trainer(Actor):
    """`after` sees each update before the next begins, for records and evaluation. With `stop` the trainer ends
    between two updates, or while it waits for a batch. `devices` are shared with rollouts; None: each has its own."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learner,
        policy: Policy,
        slots: Slots,
        ledger: Ledger,
        after: Callable[[Update], Awaitable[None]],
        stop: Stop,
        devices: Devices | None = None,
    ) -> None:
        super().__init__("trainer", capacity=1)
        self._config = config
        self._learner = learner
        self._policy = policy
        self._slots = slots
        self._ledger = ledger
        self._after = after
        self._stop = stop
        self._devices = devices or Devices()

    async def run(self) -> None:
        self._slots.live(self._policy.version)
        for number in range(self._ledger.books.updates + 1, self._config.learner.updates + 1):
            self._stop.check()  # a batch that is ready would be taken all the same
            await self._after(await self._update(number))

    async def _update(self, number: int) -> Update:
        clock = asyncio.get_running_loop()
        began = clock.time()
        version = self._policy.version
        request = TakeBatch(version=version, groups=self._config.rollout.groups_per_step)
        deadline_s = self._config.rollout.batch_deadline_s
        batch = await self._stop.unless(self.bus.ask("buffer", request, deadline_s=deadline_s))
        taken = clock.time()
        lag = version - min(g.oldest_version for g in batch.groups)
        if not 0 <= lag <= self._config.rollout.max_lag:
            raise AssertionError(f"the batch to train version {version} on has a token that is {lag} updates old")
        learning = self.bus.waiting(f"the learner: update {number}", on="process learner")
        async with self._devices.training(), learning:
            metrics = await self._learner.ask(
                train_step(batch.groups, self._config), deadline_s=self._config.learner.step_deadline_s
            )
        stepped = clock.time()
        self._ledger.train(
            Updated(
                number=number,
                groups=tuple(g.id for g in batch.groups),
                metrics=metrics,
                lag=lag,
                wait_s=taken - began,
                step_s=stepped - taken,
            )
        )
        async with self.bus.waiting(f"the policy to take version {metrics.version}"):
            await self._policy.load_weights(metrics.version, metrics.slot)
        progressed(f"update {number}")
        self._slots.live(metrics.version)
        for group in batch.groups:
            self._slots.give_back(group.id)
        return Update.of(self._ledger.books.since[-1], clock.time() - stepped)


async def redo(learner: Learner, trained: Trained, config: RunConfig) -> StepMetrics:
    """Makes an update again that no checkpoint holds: of the same trajectories, from the same weights.

    Raises `LearnerError` when the weights that come of it have another version than those that sampled what followed.
    """
    event = trained.event
    metrics = await learner.ask(train_step(trained.groups, config), deadline_s=config.learner.step_deadline_s)
    if metrics.version != event.metrics.version:
        raise LearnerError(
            f"update {event.number} made version {event.metrics.version} and makes version {metrics.version} again"
        )
    if (metrics.loss, metrics.grad_norm) != (event.metrics.loss, event.metrics.grad_norm):
        logger.warning(
            "update %d, made again, differs from the first time: loss %.9g, was %.9g; gradient norm %.9g, was %.9g",
            *(event.number, metrics.loss, event.metrics.loss, metrics.grad_norm, event.metrics.grad_norm),
        )
    return metrics


def train_step(groups: Sequence[Group], config: RunConfig) -> TrainStep:
    """What the learner is asked: every trajectory with its advantage within its group."""
    return TrainStep(samples=tuple(sample for group in groups for sample in _samples(group, config)))


def _samples(group: Group, config: RunConfig) -> list[Sample]:
    # One without a reward does not get this far; if it did, `advantages` would refuse the NaN.
    rewards = [math.nan if t.reward is None else t.reward for t in group.trajectories]
    values = advantages(rewards, config.algorithm.baseline)
    return [
        Sample(trajectory=sequence, advantage=float(a))
        for t, a in zip(group.trajectories, values, strict=True)
        for sequence in t.sequences
    ]
