"""One optimizer step: forward and backward of each micro-batch, then AdamW, on all ranks together.

Each rank has micro-batches of its own, and all of them run as many forwards and backwards as the one with the most: a
sharded model is gathered by all ranks or not at all. Whoever has none left runs an idle one, of which nothing counts.
Z, the gradient norm, the share of the router loss and what is broken are those of the whole batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ale.algorithm.layout import Layout
from ale.algorithm.objectives import Batch, Objective
from ale.errors import LearnerError
from ale.kernels.chunk_advantage import Counts
from ale.learner.batch import MicroBatch
from ale.learner.forward import PolicyModel, routed
from ale.learner.ranks import Ranks
from ale.learner.sharding import local


@dataclass
class Part:
    """A micro-batch and what the objective knows of it. `ids`: of its sequences, in the order of their action tokens.
    `fresh_A`: where pi_old is what the coming forward gives."""

    batch: MicroBatch
    ids: tuple[str, ...]
    layout: Layout
    old_A: Tensor | None = None
    mu_A: Tensor | None = None
    fresh_A: Tensor | None = None

    def __post_init__(self) -> None:
        if self.fresh_A is not None and not bool(self.fresh_A.any()):
            self.fresh_A = None

    def known(self) -> Batch:
        return Batch(self.layout, self.old_A, self.mu_A)

    def learn_old(self, logp_A: Tensor) -> None:
        """Fills pi_old in from the first forward; later epochs keep it."""
        if self.fresh_A is not None and self.old_A is not None:
            self.old_A = torch.where(self.fresh_A, logp_A, self.old_A)
            self.fresh_A = None


class Clock:
    """Seconds by phase: `lap(name)` adds what has passed since the last one."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class LogpNotFinite(LearnerError):
    """`ids`: the sequences whose log-probabilities under the weights in training are not finite."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(f"the log-probabilities of sequences {list(ids)} of the batch are not finite")
        self.ids = ids


@dataclass(frozen=True)
class Step:
    """What an optimizer step was: its loss, the gradient's norm before clipping, and numbers for the record."""

    loss: float
    grad_norm: float
    values: dict[str, float]


@dataclass(frozen=True)
class Updater:
    """Makes optimizer steps. `router_loss` is the weight of the router's loss, 0 where there is none."""

    policy: PolicyModel
    ranks: Ranks
    max_grad_norm: float
    router_loss: float

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        goal: Objective,
        parts: Sequence[Part],
        idle: MicroBatch,
        learning_rate: float,
        temperature: float,
    ) -> Step:
        """Raises `LogpNotFinite` and `LearnerError` on all ranks or on none, and then no weight was changed."""
        clock, ranks = Clock(), self.ranks
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        # Z, or 1 where some pi_old is not known yet: then the sums are divided by Z below.
        known = all(ranks.gather(all(part.fresh_A is None for part in parts)))
        count = self._total([goal.count(part.known()) for part in parts]) if known else Counts(1, 1)
        rounds = ranks.most(len(parts))
        tokens, actions = ranks.sum([sum(p.batch.tokens for p in parts), sum(p.layout.tokens for p in parts)])
        counted, statistics = list[Counts](), []
        total, router_total = 0.0, 0.0
        for number in range(rounds):
            part = parts[number] if number < len(parts) else None
            batch = idle if part is None else part.batch
            with routed(self.policy.model, batch):
                logp_A, router = self.policy(batch, temperature, self.router_loss > 0)
                logp_A = logp_A.cpu()  # the objective is small: its arrays stay where the samples came from
                self._check_finite(part, logp_A.detach(), optimizer)
                if part is None:
                    loss = logp_A.sum() * 0.0 if router is None else logp_A.sum() * 0.0 + router.cpu() * 0.0
                else:
                    part.learn_old(logp_A.detach())
                    counted.append(goal.count(part.known()))
                    result = goal.loss(logp_A, part.known(), count)
                    loss = result.loss
                    total += float(loss.detach())
                    if router is not None:
                        share = part.batch.tokens / tokens
                        loss = loss + self.router_loss * share * router.cpu()
                        router_total += float(router.detach()) * share
                    statistics.append(result.statistics())
                clock.lap("forward_s")
                loss.backward()
                clock.lap("backward_s")
        z = goal.normalizer(self._total(counted))
        scale = goal.normalizer(count) / z if z else 1.0
        total, router_total = ranks.sum([total, router_total])
        norm = self._clip(optimizer, scale)
        optimizer.step()
        clock.lap("optimizer_s")
        values = clock.laps | {
            "update_s": sum(clock.laps.values()),
            "tokens": float(tokens),
            "action_tokens": float(actions),
            "learning_rate": learning_rate,
        }
        if self.router_loss > 0:
            values["router_loss"] = router_total
        seen = [s for own in ranks.gather(statistics) for s in own]
        if seen and not goal.supervised:
            all_of_them = reduce(add, seen)
            values |= {
                "masked_high": all_of_them.masked_share_high,
                "masked_low": all_of_them.masked_share_low,
                "all_masked": float(all_of_them.all_masked),
                "effective_chunks": all_of_them.effective_units,
                "ratio_p05": all_of_them.ratio_quantile(0.05),
                "ratio_p95": all_of_them.ratio_quantile(0.95),
            }
        return Step(total * scale, norm, values)

    def _total(self, counts: Sequence[Counts]) -> Counts:
        tokens, trajectories = self.ranks.sum([sum(c.tokens for c in counts), sum(c.trajectories for c in counts)])
        return Counts(int(tokens), int(trajectories))

    def _check_finite(self, part: Part | None, logp_A: Tensor, optimizer: torch.optim.Optimizer) -> None:
        broken_A = ~logp_A.isfinite()
        mine = set[str]()
        if part is not None and bool(broken_A.any()):
            mine = {part.ids[n] for n in part.batch.sequence_A.cpu()[broken_A].tolist()}
        broken = [id_ for ids in self.ranks.gather(sorted(mine)) for id_ in ids]
        if broken:
            optimizer.zero_grad(set_to_none=True)
            raise LogpNotFinite(broken)

    def _clip(self, optimizer: torch.optim.Optimizer, scale: float) -> float:
        """Scales the gradients and returns their norm (scaled, not clipped). Raises `LearnerError` if that is not
        finite."""
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients]))
        if self.ranks.size > 1:
            (squares,) = self.ranks.sum([norm**2])
            norm = math.sqrt(squares) if squares >= 0 else math.nan
        norm *= scale
        if not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            raise LearnerError(f"the gradient norm is {norm}: no weight was changed")
        factor = scale * min(1.0, self.max_grad_norm / (norm + 1e-6))
        for gradient in gradients:
            local(gradient).mul_(factor)
        return norm
