"""The learner: one model, one optimizer, one update at a time. Plain and synchronous; `worker.py` gives it a process.

An update on samples is forward and backward of each micro-batch, then AdamW. pi_old of a token is its log-probability
under the weights that sampled it: for those of the version in training the same forward gives it, for older ones a pass
under their weights (no gradient) goes before. The normaliser Z counts what the mismatch mask lets through, which needs
every pi_old, so gradients are summed first and divided by Z after the last micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ale.algorithm.filters import Reason, logp_reason
from ale.algorithm.layout import Layout, Segments
from ale.algorithm.objectives import Batch, Objective, objective
from ale.config import Precision
from ale.errors import LearnerError
from ale.kernels.chunk_advantage import Counts
from ale.learner.batch import MicroBatch, split
from ale.learner.forward import action_logp, action_logp_under, is_moe
from ale.learner.weights import WeightRing
from ale.messages import Chunk, Demonstration, Sample, StepMetrics, Trajectory
from ale.wire import Array

PolicyOld = Literal["snapshot", "mu", "proximal"]

# Where the training forward and the sampler differ by more, another expert was chosen (fp32): see docs/design.md.
TRUTH_TOLERANCE = 1e-3


class LearnerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an update does. `temperature` is the one the samples were drawn at; `epochs` how many optimizer steps one
    batch is good for (from the second on, the ratio to pi_old is what keeps them honest)."""

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int = 0
    """Optimizer steps over which the rate falls linearly to zero; 0: it does not fall."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_tokens: int = 8192
    router_loss: float = 0.001
    temperature: float = 1.0
    epochs: int = 1
    pi_old: PolicyOld = "snapshot"
    precision: Precision = "float32"
    """Of the products in the model's body; weights, sums, logits and the optimizer stay float32."""


@dataclass
class _Part:
    """A micro-batch and what the objective knows of it. `fresh_A`: where pi_old is what the coming forward gives."""

    batch: MicroBatch
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


class Learner:
    """Owns the trained weights. Versions count updates; each is published to the ring as it is made."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ring: WeightRing,
        objective: Objective,
        settings: LearnerSettings,
    ) -> None:
        self.model = model.eval()  # no dropout: pi is the policy that sampled
        self.tokenizer = tokenizer
        self.ring = ring
        self.objective = objective
        self.settings = settings
        self.version = 0
        self._moe = settings.router_loss > 0 and is_moe(model)
        self._precision: torch.dtype = getattr(torch, settings.precision)
        self._supervised = _supervised
        self.optimizer = self._new_optimizer()
        self.steps = 0
        self.slot = ring.publish(0, model)

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Weight decay draws matrices towards zero; gains and biases, which have one axis, are left alone."""
        s = self.settings
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=s.learning_rate,
            betas=(s.beta1, s.beta2),
            fused=True,
        )

    def start_policy_optimization(self) -> None:
        """Forgets the optimizer state of the warm start: its moments belong to another objective."""
        self.optimizer = self._new_optimizer()
        self.steps = 0

    def go_on_at(self, version: int, steps: int) -> None:
        """The weights have been put back to those of `version`, the optimizer to where it was after `steps` steps."""
        self.version, self.steps = version, steps
        self.slot = self.ring.publish(version, self.model)

    def imitate(
        self, demonstrations: Sequence[Demonstration], learning_rate: float, weight_decay: float = 0.0
    ) -> StepMetrics:
        """One supervised update (eq. 1, 2): error and task masks decide which chunks carry loss."""
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        batches = self._split([d.tokens_T for d in demonstrations], [d.chunks for d in demonstrations])
        parts = [
            _Part(b, Layout.of([_segments(demonstrations[i].chunks, 1.0, supervised=True) for i in b.index]))
            for b in batches
        ]
        return self._publish(self._update(self._supervised, parts, learning_rate, 1.0))

    def learn(self, samples: Sequence[Sample]) -> StepMetrics:
        """One policy update. Samples whose log-probabilities are not finite are left out, with the reason."""
        started = time.perf_counter()
        trajectories = [s.trajectory for s in samples]
        dropped: dict[str, str] = {}
        for t in trajectories:
            reason = logp_reason(None, t.logp_A.numpy(), t.logp_sampled_A.numpy())
            if reason is not None:
                dropped[t.id] = reason
        old_N, fresh_N = self._pi_old([s for s in samples if s.trajectory.id not in dropped])
        for id_, old in old_N.items():
            if not bool((old.isfinite() | fresh_N[id_]).all()):
                dropped[id_] = Reason.LOGP_NOT_FINITE
        kept = [s for s in samples if s.trajectory.id not in dropped]
        if not kept:  # the clock of versions goes on; weights, optimizer and schedule stand still
            nothing = StepMetrics(
                version=self.version, slot=self.slot, loss=0.0, grad_norm=0.0, values={}, dropped=dropped
            )
            return self._publish(nothing)
        old_s = time.perf_counter() - started
        parts = []
        for batch in self._split_trajectories([s.trajectory for s in kept]):
            members = [kept[i] for i in batch.index]
            parts.append(
                _Part(
                    batch,
                    Layout.of([_segments(s.trajectory.chunks, s.advantage) for s in members]),
                    torch.cat([old_N[s.trajectory.id] for s in members]),
                    torch.cat([_tensor(s.trajectory.logp_A.numpy()) for s in members]),
                    torch.cat([fresh_N[s.trajectory.id] for s in members]),
                )
            )
        try:
            metrics = self._update(self.objective, parts, self._learning_rate(), self.settings.temperature)
        except _LogpNotFinite as error:
            # Z counted them: the update starts again without them. Each such round leaves fewer.
            broken = {kept[i].trajectory.id: str(Reason.LOGP_NOT_FINITE) for i in error.index}
            metrics = self.learn([s for s in kept if s.trajectory.id not in broken])
            return msgspec.structs.replace(metrics, dropped=dropped | broken | metrics.dropped)
        truth = self._truth(parts)
        for _ in range(1, self.settings.epochs):
            try:
                metrics = self._update(self.objective, parts, self._learning_rate(), self.settings.temperature)
            except _LogpNotFinite as error:
                raise LearnerError(
                    "the policy left the numbers between two steps on one batch: lower the rate"
                ) from error
        values = metrics.values | truth | {"pi_old_s": old_s}
        return self._publish(msgspec.structs.replace(metrics, values=values, dropped=dropped))

    def save(self, path: Path) -> None:
        """A Hugging Face directory that any tool can load."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def _learning_rate(self) -> float:
        s = self.settings
        rise = min(1.0, (self.steps + 1) / (s.warmup_steps + 1))
        fall = max(0.0, 1.0 - self.steps / s.decay_steps) if s.decay_steps else 1.0
        return s.learning_rate * rise * fall

    def _split(
        self,
        tokens_N: Sequence[Array],
        chunks_N: Sequence[tuple[Chunk, ...]],
        experts_N: Sequence[Array | None] | None = None,
    ) -> list[MicroBatch]:
        width = self.model.config.hidden_size
        return split(tokens_N, chunks_N, self.settings.micro_tokens, width=width, experts_N=experts_N)

    def _split_trajectories(self, given: Sequence[Trajectory]) -> list[MicroBatch]:
        return self._split([t.tokens_T for t in given], [t.chunks for t in given], [t.experts_TLJ for t in given])

    def _update(self, goal: Objective, parts: Sequence[_Part], learning_rate: float, temperature: float) -> StepMetrics:
        clock = _Clock()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        # Z, or 1 where some pi_old is not known yet: then the sums are divided by Z below.
        known = all(part.fresh_A is None for part in parts)
        count = sum((goal.count(part.known()) for part in parts), Counts(0, 0)) if known else Counts(1, 1)
        counted = Counts(0, 0)
        tokens = sum(part.batch.tokens for part in parts)
        total, router_total, statistics = 0.0, 0.0, None
        for part in parts:
            logp_A, router = action_logp(
                self.model, part.batch, temperature, precision=self._precision, router_loss=self._moe
            )
            broken_A = ~logp_A.detach().isfinite()
            if broken_A.any():
                self.optimizer.zero_grad(set_to_none=True)
                raise _LogpNotFinite([part.batch.index[n] for n in set(part.batch.sequence_A[broken_A].tolist())])
            part.learn_old(logp_A.detach())
            counted += goal.count(part.known())
            result = goal.loss(logp_A, part.known(), count)
            loss = result.loss
            if router is not None:
                share = part.batch.tokens / tokens
                loss = loss + self.settings.router_loss * share * router
                router_total += float(router.detach()) * share
            clock.lap("forward_s")
            loss.backward()  # type: ignore[no-untyped-call]
            clock.lap("backward_s")
            total += float(result.loss.detach())
            seen = result.statistics()
            statistics = seen if statistics is None else statistics + seen
        z = goal.normalizer(counted)
        scale = goal.normalizer(count) / z if z else 1.0
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise LearnerError(f"the gradient norm of update {self.version + 1} is {norm}: no weight was changed")
        factor = scale * min(1.0, self.settings.max_grad_norm / (norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(factor)
        self.optimizer.step()
        self.steps += 1
        clock.lap("optimizer_s")
        values = clock.laps | {
            "update_s": sum(clock.laps.values()),
            "tokens": float(tokens),
            "action_tokens": float(sum(part.layout.tokens for part in parts)),
            "learning_rate": learning_rate,
        }
        if self._moe:
            values["router_loss"] = router_total
        if statistics is not None and goal is self.objective:
            values |= {
                "masked_high": statistics.masked_share_high,
                "masked_low": statistics.masked_share_low,
                "all_masked": float(statistics.all_masked),
                "effective_chunks": statistics.effective_units,
                "ratio_p05": statistics.ratio_quantile(0.05),
                "ratio_p95": statistics.ratio_quantile(0.95),
            }
        return StepMetrics(version=self.version, slot=self.slot, loss=total * scale, grad_norm=norm, values=values)

    def _publish(self, metrics: StepMetrics) -> StepMetrics:
        """Makes the weights a new version for the engines to sample from."""
        clock = _Clock()
        self.version += 1
        self.slot = self.ring.publish(self.version, self.model)
        clock.lap("publish_s")
        return msgspec.structs.replace(
            metrics, version=self.version, slot=self.slot, values=metrics.values | clock.laps
        )

    def _pi_old(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """log pi_old [A] of each trajectory by id, and where it is left to the training forward (bool [A]; NaN there).

        A router's loss is not divided by Z, so with one everything is computed here.
        """
        mode = self.settings.pi_old
        recorded = {s.trajectory.id: _tensor(s.trajectory.logp_A.numpy()) for s in samples}
        nowhere = {id_: torch.zeros_like(logp, dtype=torch.bool) for id_, logp in recorded.items()}
        if mode == "mu":
            return recorded, nowhere
        old = {id_: torch.full_like(logp, math.nan) for id_, logp in recorded.items()}
        versions = {
            s.trajectory.id: torch.full((s.trajectory.action_tokens,), self.version)
            if mode == "proximal"
            else _tensor(s.trajectory.version_A.numpy())
            for s in samples
        }
        fresh = nowhere if self._moe else {id_: version_A == self.version for id_, version_A in versions.items()}
        wanted = {int(v) for id_, version_A in versions.items() for v in set(version_A[~fresh[id_]].tolist())}
        for version in sorted(wanted):
            if version != self.version and not self.version - self.ring.layout.slots < version < self.version:
                raise LearnerError(f"the weights of version {version} are gone; training is at {self.version}")
            members = [s.trajectory for s in samples if bool((versions[s.trajectory.id] == version).any())]
            weights = self.ring.views(self.ring.slot_of(version))
            for batch in self._split_trajectories(members):
                logp_A = action_logp_under(
                    self.model, weights, batch, self.settings.temperature, precision=self._precision
                )
                ids = [members[i].id for i in batch.index]
                for id_, logp in zip(ids, torch.split(logp_A, [len(recorded[i]) for i in ids]), strict=True):
                    own = versions[id_] == version
                    old[id_][own] = logp[own]
        return old, fresh

    def _truth(self, parts: Sequence[_Part]) -> dict[str, float]:
        """How well pi_old agrees with what the sampler recorded, where both are of the same version."""
        gaps = [(part.old_A - part.mu_A).abs() for part in parts if part.old_A is not None and part.mu_A is not None]
        gap_A = torch.cat(gaps) if gaps else torch.zeros(0)
        if self.settings.pi_old != "snapshot" or not len(gap_A):
            return {}
        return {
            "truth_mean": float(gap_A.mean()),
            "truth_max": float(gap_A.max()),
            "truth_exceptions": float((gap_A > TRUTH_TOLERANCE).sum()),
        }


class _Clock:
    """Seconds by phase: `lap(name)` adds what has passed since the last one."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class _LogpNotFinite(LearnerError):
    """`index`: the sequences of the batch whose log-probabilities under the weights in training are not finite."""

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__(f"the log-probabilities of sequences {list(index)} of the batch are not finite")
        self.index = index


_supervised = objective("sft")


def _segments(chunks: tuple[Chunk, ...], advantage: float, *, supervised: bool = False) -> Segments:
    carry = tuple(not c.error and c.relevant for c in chunks) if supervised else None
    return Segments(chunk_lengths=tuple(c.end - c.start for c in chunks), advantage=advantage, carry=carry)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())
