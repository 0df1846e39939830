"""The learner: one model, one optimizer, one update at a time. Plain and synchronous; `learner_process.py` gives it a
process, and with `learner.ranks` several that make each update together (`ranks.py`, `sharding.py`).

An update on samples is forward and backward of each micro-batch, then AdamW. pi_old of a token is its log-probability
under the weights that sampled it: for those of the version in training the same forward gives it, for older ones a pass
under their weights (no gradient) goes before. The normaliser Z counts what the mismatch mask lets through, which needs
every pi_old, so gradients are summed first and divided by Z after the last micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ale.algorithm.filters import Reason, logp_reason
from ale.algorithm.layout import Layout, Segments
from ale.algorithm.objectives import Objective, objective
from ale.config import Precision
from ale.errors import LearnerError
from ale.learner.batch import OVERHEAD, MicroBatch, split
from ale.learner.forward import PolicyModel, is_moe
from ale.learner.lora import save_adapters
from ale.learner.old import OldLogp, PolicyOld
from ale.learner.ranks import Ranks
from ale.learner.sharding import checkpoint_activations, decoder_layers, fill, shard
from ale.learner.update import Clock, LogpNotFinite, Part, Step, Updater
from ale.learner.versions import Versions
from ale.learner.weights import WeightRing
from ale.messages import Chunk, Demonstration, Sample, StepMetrics, Trajectory
from ale.models.load import model_without_weights
from ale.wire import Array

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
    activation_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()
    """What the adapters are that the model carries; they are added before (`lora.add_adapters`)."""


class Learner:
    """Owns the trained weights. Versions count updates; each is published to the ring as it is made.

    With several `ranks` each of them has a learner and calls its methods in the same order with the same arguments;
    what they return and raise is the same on all of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ring: WeightRing,
        objective: Objective,
        settings: LearnerSettings,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model.eval()  # no dropout: pi is the policy that sampled
        self.tokenizer = tokenizer
        self.ring = ring
        self.objective = objective
        self.settings = settings
        self.ranks = ranks or Ranks()
        self._moe = settings.router_loss > 0 and is_moe(model)
        policy = PolicyModel(model, getattr(torch, settings.precision))
        if settings.activation_checkpointing:
            checkpoint_activations(decoder_layers(model))
        if self.ranks.mesh is not None:
            shard(policy, decoder_layers(model), self.ranks, policy.precision)
        self.versions = Versions(model, ring, self.ranks)
        self._updater = Updater(policy, self.ranks, settings.max_grad_norm, settings.router_loss if self._moe else 0.0)
        self._old = OldLogp(
            policy,
            self.versions,
            self.ranks,
            self._split_trajectories,
            mode=settings.pi_old,
            temperature=settings.temperature,
            leave_fresh=not self._moe,
        )
        # A sharded model is gathered for each micro-batch: as few of them as there can be.
        self._overhead = OVERHEAD if self.ranks.size == 1 else 1 << 40
        self.optimizer = self._new_optimizer()
        self.steps = 0
        self.versions.publish(0)

    @property
    def version(self) -> int:
        return self.versions.now

    @property
    def slot(self) -> int:
        return self.versions.slot

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Weight decay draws matrices towards zero; gains and biases, which have one axis, are left alone."""
        s, trained = self.settings, self.versions.trained().values()
        matrices = [p for p in trained if p.dim() > 1]
        vectors = [p for p in trained if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)

    def start_policy_optimization(self) -> None:
        """Forgets the optimizer state of the warm start: its moments belong to another objective."""
        self.optimizer = self._new_optimizer()
        self.steps = 0

    def go_on_at(self, version: int, steps: int) -> None:
        """The weights have been put back to those of `version`, the optimizer to where it was after `steps` steps."""
        self.steps = steps
        self.versions.publish(version)

    def imitate(
        self, demonstrations: Sequence[Demonstration], learning_rate: float, weight_decay: float = 0.0
    ) -> StepMetrics:
        """One supervised update (eq. 1, 2): error and task masks decide which chunks carry loss."""
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        share = self.ranks.share([float(len(d.tokens_T)) for d in demonstrations])
        own = [demonstrations[i] for i in share]
        batches = self._split([d.tokens_T for d in own], [d.chunks for d in own])
        parts = [
            Part(
                b,
                tuple(str(share[i]) for i in b.index),
                Layout.of([_segments(own[i].chunks, 1.0, supervised=True) for i in b.index]),
            )
            for b in batches
        ]
        idle = self._idle([d.tokens_T for d in demonstrations])
        return self._publish(self._step(_supervised, parts, idle, learning_rate, 1.0))

    def learn(self, samples: Sequence[Sample]) -> StepMetrics:
        """One policy update. Samples whose log-probabilities are not finite are left out, with the reason."""
        started = time.perf_counter()
        dropped: dict[str, str] = {}
        for t in (s.trajectory for s in samples):
            reason = logp_reason(None, t.logp_A.numpy(), t.logp_sampled_A.numpy())
            if reason is not None:
                dropped[t.id] = reason
        sound = [s for s in samples if s.trajectory.id not in dropped]
        own = [sound[i] for i in self.ranks.share([float(len(s.trajectory.tokens_T)) for s in sound])]
        idle = self._idle([s.trajectory.tokens_T for s in sound])
        old_N, fresh_N = self._old.of([s.trajectory for s in own], idle)
        unfit = [id_ for id_, old in old_N.items() if not bool((old.isfinite() | fresh_N[id_]).all())]
        dropped |= {id_: Reason.LOGP_NOT_FINITE for ids in self.ranks.gather(unfit) for id_ in ids}
        kept = [s for s in own if s.trajectory.id not in dropped]
        if not self.ranks.most(len(kept)):  # the clock of versions goes on; weights, optimizer and schedule stand still
            return self._publish(Step(0.0, 0.0, {}), dropped)
        old_s = time.perf_counter() - started
        parts = []
        for batch in self._split_trajectories([s.trajectory for s in kept]):
            members = [kept[i] for i in batch.index]
            ids = tuple(s.trajectory.id for s in members)
            parts.append(
                Part(
                    batch,
                    ids,
                    Layout.of([_segments(s.trajectory.chunks, s.advantage) for s in members]),
                    torch.cat([old_N[id_] for id_ in ids]),
                    torch.cat([_tensor(s.trajectory.logp_A.numpy()) for s in members]),
                    torch.cat([fresh_N[id_] for id_ in ids]),
                )
            )
        idle = self._idle([s.trajectory.tokens_T for s in sound if s.trajectory.id not in dropped])
        temperature = self.settings.temperature
        try:
            step = self._step(self.objective, parts, idle, self._learning_rate(), temperature)
        except LogpNotFinite as error:
            # Z counted them: the update starts again without them. Each such round leaves fewer.
            broken = dict.fromkeys(error.ids, str(Reason.LOGP_NOT_FINITE))
            metrics = self.learn([s for s in samples if s.trajectory.id not in dropped | broken])
            return msgspec.structs.replace(metrics, dropped=dropped | broken | metrics.dropped)
        truth = self._truth(parts)
        for _ in range(1, self.settings.epochs):
            try:
                step = self._step(self.objective, parts, idle, self._learning_rate(), temperature)
            except LogpNotFinite as error:
                raise LearnerError(
                    "the policy left the numbers between two steps on one batch: lower the rate"
                ) from error
        return self._publish(Step(step.loss, step.grad_norm, step.values | truth | {"pi_old_s": old_s}), dropped)

    def save(self, path: Path) -> None:
        """A Hugging Face directory that any tool can load; with adapters, those merged in, and alone in `adapter/`."""
        if self.ranks.rank != 0:
            return
        model = self.model
        if self.ranks.size > 1 or self.settings.lora_rank:
            # What was published last is the whole model, and these are its weights: nothing is copied.
            model = model_without_weights(self.model.config)
            model.generation_config = self.model.generation_config
            fill(model, self.ring.views(self.slot), dict(self.model.named_buffers()))
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        if self.settings.lora_rank:
            s, name = self.settings, self.model.name_or_path
            weights = self.versions.weights(self.version)
            save_adapters(path / "adapter", name, weights, s.lora_rank, s.lora_alpha, s.lora_targets)

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
        width, micro_tokens = self.model.config.hidden_size, self.settings.micro_tokens
        batches, error = list[MicroBatch](), None
        try:
            batches = split(tokens_N, chunks_N, micro_tokens, width=width, overhead=self._overhead, experts_N=experts_N)
        except ValueError as wrong:
            error = wrong
        self.ranks.agree(error)
        return [batch.to(self.ranks.device) for batch in batches]

    def _split_trajectories(self, given: Sequence[Trajectory]) -> list[MicroBatch]:
        return self._split([t.tokens_T for t in given], [t.chunks for t in given], [t.experts_TLJ for t in given])

    def _idle(self, tokens_N: Sequence[Array]) -> MicroBatch:
        """What a rank runs that has no sample left: two tokens, of which nothing counts. They are those of a sample, so
        that what is broken about them is seen there."""
        ids = next((tokens.numpy()[:1] for tokens in tokens_N if len(tokens)), np.zeros(1, np.int64))
        (batch,) = split([Array.of(np.repeat(ids, 2))], [(Chunk(1, 2, "cut"),)], 2)
        return batch.to(self.ranks.device)

    def _step(
        self, goal: Objective, parts: Sequence[Part], idle: MicroBatch, learning_rate: float, temperature: float
    ) -> Step:
        try:
            step = self._updater.step(self.optimizer, goal, parts, idle, learning_rate, temperature)
        except LogpNotFinite:
            raise
        except LearnerError as error:
            raise LearnerError(f"update {self.version + 1}: {error}") from error
        self.steps += 1
        return step

    def _publish(self, step: Step, dropped: dict[str, str] | None = None) -> StepMetrics:
        """Makes the weights a new version for the engines to sample from."""
        clock = Clock()
        self.versions.publish(self.version + 1)
        clock.lap("publish_s")
        return StepMetrics(
            version=self.version,
            slot=self.slot,
            loss=step.loss,
            grad_norm=step.grad_norm,
            values=step.values | clock.laps,
            dropped=dropped or {},
        )

    def _truth(self, parts: Sequence[Part]) -> dict[str, float]:
        """How well pi_old agrees with what the sampler recorded, where both are of the same version."""
        if self.settings.pi_old != "snapshot":
            return {}
        gaps = [(part.old_A - part.mu_A).abs() for part in parts if part.old_A is not None and part.mu_A is not None]
        gap_A = torch.cat(gaps) if gaps else torch.zeros(0)
        count, total, over = self.ranks.sum([len(gap_A), float(gap_A.sum()), float((gap_A > TRUTH_TOLERANCE).sum())])
        largest = max(self.ranks.gather(float(gap_A.max()) if len(gap_A) else 0.0))
        if not count:
            return {}
        return {"truth_mean": total / count, "truth_max": largest, "truth_exceptions": over}


_supervised = objective("sft")


def _segments(chunks: tuple[Chunk, ...], advantage: float, *, supervised: bool = False) -> Segments:
    carry = tuple(not c.error and c.relevant for c in chunks) if supervised else None
    return Segments(chunk_lengths=tuple(c.end - c.start for c in chunks), advantage=advantage, carry=carry)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())
