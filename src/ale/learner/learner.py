"""The learner: one model, one optimizer, one update at a time. Plain and synchronous; `worker.py` gives it a process.

An update on samples takes three passes: pi_old of every action token under the weights of the version that sampled it
(no gradient; the normaliser Z follows), then forward and backward of each micro-batch with that global Z, then AdamW.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
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
from ale.errors import LearnerError
from ale.kernels.chunk_advantage import Counts
from ale.learner.batch import MicroBatch, split
from ale.learner.forward import action_logp, action_logp_under, is_moe
from ale.learner.weights import WeightRing
from ale.messages import Chunk, Demonstration, Sample, StepMetrics

PolicyOld = Literal["snapshot", "mu", "proximal"]

# Where the training forward and the sampler differ by more, another expert was chosen (fp32): see docs/design.md.
TRUTH_TOLERANCE = 1e-3


class LearnerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an update does. `temperature` is the one the samples were drawn at; `epochs` how many optimizer steps one
    batch is good for (from the second on, the ratio to pi_old is what keeps them honest)."""

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_tokens: int = 8192
    router_loss: float = 0.001
    temperature: float = 1.0
    epochs: int = 1
    pi_old: PolicyOld = "snapshot"


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
        self._supervised = _supervised
        self.optimizer = self._new_optimizer()
        self._steps = 0
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
        )

    def start_policy_optimization(self) -> None:
        """Forgets the optimizer state of the warm start: its moments belong to another objective."""
        self.optimizer = self._new_optimizer()
        self._steps = 0

    def imitate(
        self, demonstrations: Sequence[Demonstration], learning_rate: float, weight_decay: float = 0.0
    ) -> StepMetrics:
        """One supervised update (eq. 1, 2): error and task masks decide which chunks carry loss."""
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        batches = split(
            [d.tokens_T for d in demonstrations], [d.chunks for d in demonstrations], self.settings.micro_tokens
        )
        parts = [
            Batch(Layout.of([_segments(demonstrations[i].chunks, 1.0, supervised=True) for i in batch.index]))
            for batch in batches
        ]
        return self._publish(self._update(self._supervised, batches, parts, learning_rate, 1.0))

    def learn(self, samples: Sequence[Sample]) -> StepMetrics:
        """One policy update. Samples whose log-probabilities are not finite are left out, with the reason."""
        started = time.perf_counter()
        trajectories = [s.trajectory for s in samples]
        dropped: dict[str, str] = {}
        for t in trajectories:
            reason = logp_reason(None, t.logp_A.numpy(), t.logp_sampled_A.numpy())
            if reason is not None:
                dropped[t.id] = reason
        old_N, truth = self._pi_old([s for s in samples if s.trajectory.id not in dropped])
        for s in samples:
            if s.trajectory.id in old_N and not bool(torch.isfinite(old_N[s.trajectory.id]).all()):
                dropped[s.trajectory.id] = Reason.LOGP_NOT_FINITE
        kept = [s for s in samples if s.trajectory.id not in dropped]
        old_s = time.perf_counter() - started
        batches = split(
            [s.trajectory.tokens_T for s in kept], [s.trajectory.chunks for s in kept], self.settings.micro_tokens
        )
        parts = []
        for batch in batches:
            members = [kept[i] for i in batch.index]
            parts.append(
                Batch(
                    Layout.of([_segments(s.trajectory.chunks, s.advantage) for s in members]),
                    torch.cat([old_N[s.trajectory.id] for s in members]),
                    torch.cat([_tensor(s.trajectory.logp_A.numpy()) for s in members]),
                )
            )
        try:
            metrics = self._update(self.objective, batches, parts, self._learning_rate(), self.settings.temperature)
        except _LogpNotFinite as error:
            # Z counted them: the update starts again without them. Each such round leaves fewer.
            broken = {kept[i].trajectory.id: str(Reason.LOGP_NOT_FINITE) for i in error.index}
            metrics = self.learn([s for s in kept if s.trajectory.id not in broken])
            return msgspec.structs.replace(metrics, dropped=dropped | broken | metrics.dropped)
        for _ in range(1, self.settings.epochs):
            try:
                metrics = self._update(self.objective, batches, parts, self._learning_rate(), self.settings.temperature)
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
        return self.settings.learning_rate * min(1.0, (self._steps + 1) / (self.settings.warmup_steps + 1))

    def _update(
        self,
        goal: Objective,
        batches: Sequence[MicroBatch],
        parts: Sequence[Batch],
        learning_rate: float,
        temperature: float,
    ) -> StepMetrics:
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        count = sum((goal.count(part) for part in parts), Counts(0, 0))
        tokens = sum(int(batch.real_BT.sum()) for batch in batches)
        total, router_total, statistics = 0.0, 0.0, None
        for batch, part in zip(batches, parts, strict=True):
            logp_A, router = action_logp(self.model, batch, temperature, router_loss=self._moe)
            broken_A = ~logp_A.detach().isfinite()
            if broken_A.any():
                self.optimizer.zero_grad(set_to_none=True)
                raise _LogpNotFinite([batch.index[row] for row in set(batch.action_row_A[broken_A].tolist())])
            result = goal.loss(logp_A, part, count)
            loss = result.loss
            if router is not None:
                share = int(batch.real_BT.sum()) / tokens
                loss = loss + self.settings.router_loss * share * router
                router_total += float(router.detach()) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(result.loss.detach())
            seen = result.statistics()
            statistics = seen if statistics is None else statistics + seen
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise LearnerError(f"the gradient norm of update {self.version + 1} is {norm}: no weight was changed")
        self.optimizer.step()
        self._steps += 1
        values = {
            "update_s": time.perf_counter() - started,
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
        return StepMetrics(version=self.version, slot=self.slot, loss=total, grad_norm=norm, values=values)

    def _publish(self, metrics: StepMetrics) -> StepMetrics:
        """Makes the weights a new version for the engines to sample from."""
        self.version += 1
        self.slot = self.ring.publish(self.version, self.model)
        return msgspec.structs.replace(metrics, version=self.version, slot=self.slot)

    def _pi_old(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """log pi_old [A] of each trajectory by id, and how well it agrees with what the sampler recorded."""
        mode = self.settings.pi_old
        recorded = {s.trajectory.id: _tensor(s.trajectory.logp_A.numpy()) for s in samples}
        if mode == "mu":
            return recorded, {}
        old = {id_: torch.full_like(logp, math.nan) for id_, logp in recorded.items()}
        versions = {s.trajectory.id: _tensor(s.trajectory.version_A.numpy()) for s in samples}
        wanted = (
            {self.version} if mode == "proximal" else {int(v) for vs in versions.values() for v in set(vs.tolist())}
        )
        for version in sorted(wanted):
            if version != self.version and not self.version - self.ring.layout.slots < version < self.version:
                raise LearnerError(f"the weights of version {version} are gone; training is at {self.version}")
            members = [s for s in samples if mode == "proximal" or bool((versions[s.trajectory.id] == version).any())]
            weights = self.ring.views(self.ring.slot_of(version))
            for batch in split(
                [s.trajectory.tokens_T for s in members],
                [s.trajectory.chunks for s in members],
                self.settings.micro_tokens,
            ):
                logp_A = action_logp_under(self.model, weights, batch, self.settings.temperature)
                ids = [members[i].trajectory.id for i in batch.index]
                for id_, logp in zip(ids, torch.split(logp_A, [len(recorded[i]) for i in ids]), strict=True):
                    own = (
                        torch.ones_like(versions[id_], dtype=torch.bool)
                        if mode == "proximal"
                        else versions[id_] == version
                    )
                    old[id_][own] = logp[own]
        gap = torch.cat([(old[id_] - recorded[id_]).abs() for id_ in old]) if old else torch.zeros(0)
        if mode == "proximal" or not len(gap):
            return old, {}
        return old, {
            "truth_mean": float(gap.mean()),
            "truth_max": float(gap.max()),
            "truth_exceptions": float((gap > TRUTH_TOLERANCE).sum()),
        }


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
