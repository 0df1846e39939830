"""The trainer: the clock of a run. Take a batch, update, hand the new weights to the policy, give the slots back."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from ale.actor import Actor
from ale.actors.ledger import Ledger
from ale.actors.slots import Slots
from ale.algorithm.advantages import advantages
from ale.config import RunConfig
from ale.messages import Batch, Group, Sample, StepMetrics, TakeBatch, TrainStep
from ale.policy.port import Policy
from ale.wire import Reply, Request


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """`Update(number=3, batch=Batch(...), metrics=StepMetrics(...), lag=1, ...)`: one turn of the clock."""

    number: int
    batch: Batch
    metrics: StepMetrics
    lag: int
    wait_s: float
    step_s: float
    sync_s: float


class Learner(Protocol):
    """What the trainer needs of the learner's process."""

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply: ...


class Trainer(Actor):
    """`after` sees each update before the next begins, for records and evaluation."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learner,
        policy: Policy,
        slots: Slots,
        ledger: Ledger,
        after: Callable[[Update], Awaitable[None]],
    ) -> None:
        super().__init__("trainer", capacity=1)
        self._config = config
        self._learner = learner
        self._policy = policy
        self._slots = slots
        self._ledger = ledger
        self._after = after

    async def run(self) -> None:
        for number in range(1, self._config.learner.updates + 1):
            await self._after(await self._update(number))

    async def _update(self, number: int) -> Update:
        began = time.monotonic()
        version = self._policy.version
        request = TakeBatch(version=version, groups=self._config.rollout.groups_per_step)
        batch = await self.bus.ask("buffer", request, deadline_s=self._config.learner.step_deadline_s)
        taken = time.monotonic()
        lag = version - min(g.oldest_version for g in batch.groups)
        step = TrainStep(samples=tuple(self._samples(batch)))
        async with self.bus.waiting(f"the learner: update {number}"):
            metrics = await self._learner.ask(step, deadline_s=self._config.learner.step_deadline_s)
        stepped = time.monotonic()
        await self._policy.load_weights(metrics.version, metrics.slot)
        for group in batch.groups:
            for t in group.trajectories:
                if t.id in metrics.dropped:
                    self._ledger.drop(t.id, metrics.dropped[t.id], t.action_tokens)
            self._ledger.train(t.id for t in group.trajectories if t.id not in metrics.dropped)
            self._slots.give_back(group.id)
        return Update(
            number=number,
            batch=batch,
            metrics=metrics,
            lag=lag,
            wait_s=taken - began,
            step_s=stepped - taken,
            sync_s=time.monotonic() - stepped,
        )

    def _samples(self, batch: Batch) -> list[Sample]:
        return [sample for group in batch.groups for sample in self._group(group)]

    def _group(self, group: Group) -> list[Sample]:
        # One without a reward does not get this far; if it did, `advantages` would refuse the NaN.
        rewards = [math.nan if t.reward is None else t.reward for t in group.trajectories]
        values = advantages(rewards, self._config.algorithm.baseline)
        return [
            Sample(trajectory=sequence, advantage=float(a))
            for t, a in zip(group.trajectories, values, strict=True)
            for sequence in t.sequences
        ]
