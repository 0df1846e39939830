"""What `chunk_advantage` takes, gives and computes, the slow and obvious way: Python loops, autograd, fp32 or fp64.

Axes: T action tokens, C chunks, N trajectories, U units. A unit is the finest thing that has a weight of its own: a
chunk, or a token where a level of the `Weighting` is "token".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Level = Literal["token", "chunk", "sequence"]
Beyond = Literal["clip", "drop"]
Normalization = Literal["token", "sequence", "sequence_token", "constant"]


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How the weight of a token follows from return, ratio and mismatch. The default is IPA (2512.24873, eq. 7-9).

    `weight = mask * factor(ratio) * return`, all of it constant for the gradient:
    ratio      exp(mean(logp - logp_old)) over the token, chunk or trajectory (`ratio_level`); exp of the sum, not of
               the mean, with `ratio_mean=False` (the true likelihood ratio of the trajectory: TOPR)
    factor     the ratio held within `clip_positive` where the return is positive, else within `clip_negative`. Outside
               them it is clipped, or dropped to 0 (`beyond="drop"`: PPO's gradient, dual clip included). (1, 1) ignores
               the ratio.
    mask       mask_low <= exp(mean(logp_old - logp_mu)) <= mask_high over `mask_level`; `math.inf` turns it off
    """

    gamma: float = 0.95
    ratio_level: Level = "chunk"
    ratio_mean: bool = True
    clip_positive: tuple[float, float] = (1.0, 1.0)
    clip_negative: tuple[float, float] = (0.0, 1.0)
    beyond: Beyond = "clip"
    mask_level: Level = "chunk"
    mask_high: float = 2.0
    mask_low: float = 0.0
    normalization: Normalization = "token"

    def __post_init__(self) -> None:
        def require(true: bool, what: str) -> None:
            if not true:
                raise ValueError(f"Weighting: expected {what}")

        require(0.0 <= self.gamma <= 1.0, f"0 <= gamma <= 1, got {self.gamma}")
        for name in ("clip_positive", "clip_negative"):
            low, high = getattr(self, name)
            # An unbounded factor is an unbounded gradient: one stray token would overflow the whole batch.
            require(0.0 <= low <= high < math.inf, f"0 <= low <= high < inf in {name}, got {(low, high)}")
        require(
            0.0 <= self.mask_low < self.mask_high, f"0 <= mask_low < mask_high, got {self.mask_low, self.mask_high}"
        )
        for name, allowed in (
            ("ratio_level", Level),
            ("mask_level", Level),
            ("beyond", Beyond),
            ("normalization", Normalization),
        ):
            value = getattr(self, name)
            require(value in get_args(allowed), f"{name} in {get_args(allowed)}, got {value!r}")

    @property
    def per_token(self) -> bool:
        return "token" in (self.ratio_level, self.mask_level)

    @property
    def log_mask(self) -> tuple[float, float]:
        """The bounds of the mask as bounds on the mean log-ratio: in logs nothing overflows."""
        low = math.log(self.mask_low) if self.mask_low > 0 else -math.inf
        return low, math.log(self.mask_high)


class Counts(NamedTuple):
    """What the mask lets through: the normaliser of a batch, known before any gradient. Adds up over micro-batches
    and ranks."""

    tokens: int
    trajectories: int

    def __add__(self, other: object) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(self.tokens + other.tokens, self.trajectories + other.trajectories)


# Bins of |log ratio|: four to the octave from 2^-10 to 2^4, mirrored, with one bin of zero in the middle. A quantile
# read from them is within 10% of the true log-ratio, and bins add up over micro-batches where quantiles do not.
_OCTAVES, _SMALLEST, _PER_OCTAVE = 14, -10, 4
_BINS = _OCTAVES * _PER_OCTAVE


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the units (chunks, or tokens) of a micro-batch that carry the loss; `a + b` are those of both."""

    units: int = 0
    tokens: int = 0
    units_kept: int = 0
    tokens_kept: int = 0
    units_high: int = 0
    tokens_high: int = 0
    units_low: int = 0
    tokens_low: int = 0
    units_positive: int = 0
    units_clipped: int = 0
    weight_sum: float = 0.0
    weight_square_sum: float = 0.0
    ratio_bins: tuple[int, ...] = (0,) * (2 * _BINS + 1)

    def __add__(self, other: Statistics) -> Statistics:
        totals = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "ratio_bins"
        }
        bins = tuple(a + b for a, b in zip(self.ratio_bins, other.ratio_bins, strict=True))
        return Statistics(**totals, ratio_bins=bins)

    @property
    def all_masked(self) -> bool:
        """There was something to train on and the mismatch mask took all of it."""
        return self.units > 0 and self.units_kept == 0

    @property
    def masked_share_high(self) -> float:
        """Share of the tokens masked because pi_old / mu lay above `mask_high`."""
        return self.tokens_high / self.tokens if self.tokens else 0.0

    @property
    def masked_share_low(self) -> float:
        return self.tokens_low / self.tokens if self.tokens else 0.0

    @property
    def effective_units(self) -> float:
        """(sum |w|)^2 / sum w^2: how many equally weighted units the batch is worth."""
        return self.weight_sum**2 / self.weight_square_sum if self.weight_square_sum > 0 else 0.0

    def ratio_quantile(self, share: float) -> float:
        """The importance ratio below which `share` of the kept units lie; 1 for an empty batch. From bins: the log of
        it is within 10%, magnitudes below 2^-10 read as 0 and above 2^4 as 2^4."""
        left = share * sum(self.ratio_bins)
        for index, count in enumerate(self.ratio_bins):
            left -= count
            if count and left <= 0:
                side = index - _BINS
                if side == 0:
                    return 1.0
                magnitude = 2.0 ** ((abs(side) - 0.5) / _PER_OCTAVE + _SMALLEST)
                return math.exp(math.copysign(magnitude, side))
        return 1.0


@dataclass(frozen=True)
class ChunkAdvantage:
    """The loss, differentiable with respect to `logp_T` only, and the constants it was made of.

    `tokens_U` counts the tokens of a unit that carry the loss (0: empty or not carried), `mask_U` is true where the
    unit has tokens and passes the mismatch mask. Logs, not ratios: they do not overflow.
    """

    loss: Tensor
    weighting: Weighting
    return_C: Tensor
    weight_U: Tensor
    log_ratio_U: Tensor
    log_mismatch_U: Tensor
    mask_U: Tensor
    tokens_U: Tensor
    positive_U: Tensor

    def statistics(self) -> Statistics:
        """Sums of this micro-batch, from the units: no second pass over the tokens. One synchronisation on a GPU."""
        carried = self.tokens_U > 0
        kept = self.mask_U
        log_high = torch.tensor(self.weighting.log_mask[1], dtype=self.log_mismatch_U.dtype)
        high = carried & (self.log_mismatch_U > log_high)
        low = carried & ~kept & ~high
        # (1, 1) ignores the ratio: nothing is clipped there.
        bounds = torch.tensor([self.weighting.clip_negative, self.weighting.clip_positive], dtype=torch.float64).log()
        bounds[bounds[:, 0] == bounds[:, 1]] = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
        low_U, high_U = bounds.to(self.log_ratio_U.device)[self.positive_U.long()].unbind(1)
        clipped = kept & ((self.log_ratio_U < low_U) | (self.log_ratio_U > high_U))
        ratio = torch.nan_to_num(self.log_ratio_U[kept].double(), nan=math.inf)
        octave = ratio.abs().log2() - _SMALLEST
        bins = (octave * _PER_OCTAVE).floor().clamp(-1, _BINS - 1).long() + 1
        bins = torch.where(ratio < 0, -bins, bins) + _BINS
        weight = self.weight_U.double()
        integers = torch.stack(
            [
                part
                for mask in (carried, kept, high, low)
                for part in (mask.sum(), torch.where(mask, self.tokens_U, 0).sum())
            ]
            + [(kept & self.positive_U).sum(), clipped.sum()]
        )
        floats = torch.stack([weight.abs().sum(), weight.square().sum()])
        packed = torch.cat([integers.double(), floats, torch.bincount(bins, minlength=2 * _BINS + 1).double()]).tolist()
        units, tokens, u_kept, t_kept, u_high, t_high, u_low, t_low, positive, clips = map(int, packed[:10])
        return Statistics(
            units=units,
            tokens=tokens,
            units_kept=u_kept,
            tokens_kept=t_kept,
            units_high=u_high,
            tokens_high=t_high,
            units_low=u_low,
            tokens_low=t_low,
            units_positive=positive,
            units_clipped=clips,
            weight_sum=packed[10],
            weight_square_sum=packed[11],
            ratio_bins=tuple(map(int, packed[12:])),
        )


def chunk_advantage_reference(
    logp_T: Tensor,
    logp_old_T: Tensor | None,
    logp_mu_T: Tensor | None,
    chunk_offsets: Tensor,
    trajectory_offsets: Tensor,
    advantage_N: Tensor,
    *,
    weighting: Weighting | None = None,
    chunk_rewards_C: Tensor | None = None,
    outcome_chunk_N: Tensor | None = None,
    carry_C: Tensor | None = None,
    normalizer: float | None = None,
) -> ChunkAdvantage:
    """The equations of `chunk_advantage`, same arguments, one trajectory, chunk and unit after the other."""
    rule = Weighting() if weighting is None else weighting
    dtype = torch.float64 if logp_T.dtype == torch.float64 else torch.float32
    logp = logp_T.to(dtype)
    old = torch.zeros_like(logp) if logp_old_T is None else logp_old_T.to(dtype)
    mu = None if logp_old_T is None or logp_mu_T is None else logp_mu_T.to(dtype)
    chunk, trajectory = chunk_offsets.tolist(), trajectory_offsets.tolist()
    C, N = len(chunk) - 1, len(trajectory) - 1
    carry = [True] * C if carry_C is None else carry_C.tolist()

    def mean_log(numerator: Tensor, denominator: Tensor | None, tokens: list[int], mean: bool = True) -> Tensor:
        if not tokens or denominator is None:
            return logp.new_zeros(())
        difference = (numerator[tokens] - denominator[tokens]).detach()
        return difference.mean() if mean else difference.sum()

    log_low, log_high = (torch.tensor(bound, dtype=dtype) for bound in rule.log_mask)
    return_C = torch.zeros(C, dtype=dtype)
    units: list[tuple[Tensor, Tensor, Tensor, bool, int, bool]] = []
    loss_N, kept_N = [logp[:0].sum() for _ in range(N)], [0] * N
    for n in range(N):
        chunks = range(trajectory[n], trajectory[n + 1])
        of_chunk = {c: list(range(chunk[c], chunk[c + 1])) if carry[c] else [] for c in chunks}
        of_trajectory = [t for c in chunks for t in of_chunk[c]]
        outcome = chunks.stop - 1 if outcome_chunk_N is None else chunks.start + int(outcome_chunk_N[n])
        following = 0.0
        for c in reversed(chunks):  # eq. 7: G_k = r_k + gamma G_{k+1}
            reward = float(advantage_N[n]) if c == outcome else 0.0
            reward += 0.0 if chunk_rewards_C is None else float(chunk_rewards_C[c])
            following = reward + rule.gamma * following
            return_C[c] = following
        for c in chunks:
            alone = [[t] for t in range(chunk[c], chunk[c + 1])] if rule.per_token else [of_chunk[c]]
            for unit in alone:
                over = {"token": unit, "chunk": of_chunk[c], "sequence": of_trajectory}
                tokens = unit if carry[c] else []
                log_ratio = mean_log(logp, old, over[rule.ratio_level] if tokens else [], rule.ratio_mean)
                log_mismatch = mean_log(old, mu, over[rule.mask_level] if tokens else [])
                if log_mismatch.isnan():  # -inf - -inf: mu could not have sampled this
                    log_mismatch = torch.full_like(log_mismatch, math.inf)
                keep = bool(tokens) and bool(log_low <= log_mismatch) and bool(log_mismatch <= log_high)
                G = return_C[c]
                low, high = rule.clip_positive if G > 0 else rule.clip_negative
                ratio = log_ratio.exp()
                factor = ratio.clamp(low, high)
                if rule.beyond == "drop" and (ratio < low or ratio > high):
                    factor = torch.zeros_like(ratio)
                weight = factor * G if keep and G != 0 else torch.zeros_like(ratio)
                if weight != 0:
                    loss_N[n] = loss_N[n] - weight * logp[tokens].sum()  # eq. 9
                kept_N[n] += len(tokens) * keep
                units.append((weight, log_ratio, log_mismatch, keep, len(tokens), bool(G > 0)))

    if rule.normalization == "sequence_token":
        loss_N = [loss / max(kept, 1) for loss, kept in zip(loss_N, kept_N, strict=True)]
    if normalizer is None:
        counts = Counts(sum(kept_N), sum(kept > 0 for kept in kept_N))
        normalizer = normalizer_of(rule, counts)
    loss = torch.stack(loss_N).sum() if loss_N else logp[:0].sum()
    columns = list(zip(*units, strict=True)) if units else [()] * 6
    dtypes = (dtype, dtype, dtype, torch.bool, torch.int64, torch.bool)
    arrays = [torch.tensor(column, dtype=kind) for column, kind in zip(columns, dtypes, strict=True)]
    return ChunkAdvantage(loss / normalizer if normalizer else loss * 0.0, rule, return_C, *arrays)


def normalizer_of(weighting: Weighting, counts: Counts) -> float:
    """Z of a batch from what its mask lets through. "constant" has none: the caller names the number."""
    if weighting.normalization == "constant":
        raise ValueError('normalization "constant" needs normalizer=<a positive number>, got None')
    return float(counts.tokens if weighting.normalization == "token" else counts.trajectories)
