"""The losses, each a `Weighting` of the one op `chunk_advantage`.

A learner takes two steps:

    count = sum((objective.count(batch) for batch in whole_batch), Counts(0, 0))    # before any gradient, all ranks
    for batch in whole_batch:
        objective.loss(logp_T, batch, count).loss.backward()                        # no division by their number

The mismatch mask depends on pi_old and mu alone, so Z is known before the first gradient and the micro-batch losses add
up to that of the whole batch, however it is split. Equation 10 is the weighted sum of two objectives, "imitation" on
expert trajectories and "ipa" on resampled ones, each with its own batches and its own count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ale.config import ObjectiveName
from ale.errors import ConfigError
from ale.kernels.chunk_advantage import ChunkAdvantage, Counts, Weighting, chunk_advantage, chunk_counts

from .layout import Layout

Supervised = Literal["sft", "imitation"]
AnyObjective = Literal[ObjectiveName, Supervised]

WEIGHTINGS: dict[AnyObjective, Weighting] = {
    # arXiv 2512.24873, eq. 7-9: return, ratio and mask per chunk.
    "ipa": Weighting(),
    # The report's own starting point, eq. 4-6: no discount, one ratio per trajectory, mask per token.
    "baseline": Weighting(gamma=1.0, ratio_level="sequence", mask_level="token"),
    "token": Weighting(gamma=1.0, ratio_level="token", mask_level="token"),
    # TOPR, arXiv 2503.14286: the likelihood ratio of the whole trajectory, no mask.
    "topr": Weighting(gamma=1.0, ratio_level="sequence", ratio_mean=False, mask_high=math.inf),
    # GRPO, arXiv 2402.03300: PPO's clipped ratio per token; 3 is the dual clip of arXiv 1912.09729.
    "grpo": Weighting(
        gamma=1.0,
        ratio_level="token",
        clip_positive=(0.0, 1.2),
        clip_negative=(0.8, 3.0),
        beyond="drop",
        mask_high=math.inf,
        normalization="sequence_token",
    ),
    # GSPO, arXiv 2507.18071: the same with the geometric mean over the response and its much tighter clip.
    "gspo": Weighting(
        gamma=1.0,
        ratio_level="sequence",
        clip_positive=(0.0, 1.0 + 4e-4),
        clip_negative=(1.0 - 3e-4, 3.0),
        beyond="drop",
        mask_high=math.inf,
        normalization="sequence_token",
    ),
    # Eq. 1, 2: plain log-likelihood of the chunks that `carry` says were neither erroneous nor off the task.
    "sft": Weighting(gamma=1.0, clip_negative=(1.0, 1.0), mask_high=math.inf),
    # Eq. 10: the return of an expert chunk, times its geometric-mean probability under the policy.
    "imitation": Weighting(clip_positive=(0.0, 1.0), mask_high=math.inf),
}


@dataclass(frozen=True)
class Batch:
    """A batch or micro-batch: its layout, and what was known of its action tokens before the update. Supervised
    objectives need neither `logp_old_T` nor `logp_mu_T`."""

    layout: Layout
    logp_old_T: Tensor | None = None
    logp_mu_T: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What an update minimises. `objective(name)` builds one.

    name        of the algorithm, for reports
    weighting   how a token's weight follows from return, ratio and mismatch
    constant    Z where `weighting.normalization` is "constant"
    """

    name: AnyObjective
    weighting: Weighting = field(default_factory=Weighting)
    constant: float | None = None

    @property
    def supervised(self) -> bool:
        """Not weighted by how the data were sampled: no pi_old, no mu."""
        return self.name in get_args(Supervised)

    def count(self, batch: Batch) -> Counts:
        """Tokens and trajectories of the batch that its masks let through. Sum it over micro-batches and ranks."""
        layout = batch.layout
        if self.supervised:
            # Nothing but the layout decides; the values of this vector are never looked at.
            old_T, mu_T = torch.zeros(layout.tokens), None
        else:
            old_T, mu_T = self._sampled(batch)
        return chunk_counts(
            old_T,
            mu_T,
            torch.from_numpy(layout.chunk_offsets),
            torch.from_numpy(layout.trajectory_offsets),
            weighting=self.weighting,
            carry_C=_tensor(layout.carry_C),
        )

    def loss(self, logp_T: Tensor, batch: Batch, count: Counts) -> ChunkAdvantage:
        """The micro-batch's share of the loss of the batch that `count` was taken over; call `.loss.backward()`."""
        layout = batch.layout
        old_T, mu_T = (None, None) if self.supervised else self._sampled(batch)
        return chunk_advantage(
            logp_T,
            old_T,
            mu_T,
            torch.from_numpy(layout.chunk_offsets),
            torch.from_numpy(layout.trajectory_offsets),
            torch.from_numpy(np.ones_like(layout.advantage_N) if self.name == "sft" else layout.advantage_N),
            weighting=self.weighting,
            chunk_rewards_C=None if self.name == "sft" else _tensor(layout.rewards_C),
            outcome_chunk_N=torch.from_numpy(layout.outcome_N),
            carry_C=_tensor(layout.carry_C),
            normalizer=self.normalizer(count),
        )

    def normalizer(self, count: Counts) -> float:
        """Z of a batch of which `count` was counted: what its loss is divided by."""
        match self.weighting.normalization:
            case "token":
                return float(count.tokens)
            case "sequence" | "sequence_token":
                return float(count.trajectories)
            case "constant":
                return self.constant or 0.0  # refused where the loss is taken

    def _sampled(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if batch.logp_old_T is None:
            raise ValueError(f'logp_old_T: objective "{self.name}" needs pi_old of every action token, got None')
        return batch.logp_old_T, batch.logp_mu_T


def imitation(il_weight: Literal["geometric", "none"] = "geometric", **settings: Any) -> Objective:
    """The imitation term of eq. 10. `il_weight` is q_k: the geometric-mean probability of the chunk under the policy
    (the product in the report underflows for a chunk of a hundred tokens), or "none", 1."""
    if il_weight not in ("geometric", "none"):
        raise ConfigError(f'il_weight: expected "geometric" or "none", got {il_weight!r}')
    if il_weight == "none":
        settings |= {"clip_positive": (1.0, 1.0), "clip_negative": (1.0, 1.0)}
    return objective("imitation", **settings)


def objective(name: AnyObjective, *, constant: float | None = None, **settings: Any) -> Objective:
    """The objective of that name, with fields of its `Weighting` changed: `objective("ipa", gamma=0.9)`.

    ConfigError for an unknown name or setting, or one out of its range.
    """
    if name not in WEIGHTINGS:
        raise ConfigError(f"objective: expected one of {get_args(AnyObjective)}, got {name!r}")
    try:
        weighting = replace(WEIGHTINGS[name], **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'objective "{name}": {error}') from error
    if (weighting.normalization == "constant") != (constant is not None) or (constant is not None and not constant > 0):
        raise ConfigError(
            f'constant: expected a positive number with normalization = "constant" and None with any other, '
            f'got {constant} with "{weighting.normalization}"'
        )
    return Objective(name, weighting, constant)


def _tensor(array: npt.NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
