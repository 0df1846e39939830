"""The CPU path: numpy, whose `reduceat` sums each segment pairwise and by itself, four times faster than torch's
`index_add_` or `segment_reduce` here.

Axes: T action tokens, C chunks, N trajectories, U units (chunks, or tokens where a level is "token").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .reference import Counts, Weighting, normalizer_of
from .tiles import Flags, Floats, Integers, Ragged, Rewards


@dataclass(frozen=True)
class Tokens:
    logp_T: Tensor | None
    old_T: Tensor | None
    mu_T: Tensor | None
    ragged: Ragged
    rule: Weighting

    @cached_property
    def dtype(self) -> type[Any]:
        """Of the results: that of logp, fp32 at least."""
        first = self.old_T if self.logp_T is None else self.logp_T
        return np.float64 if first is not None and first.dtype == torch.float64 else np.float32

    @cached_property
    def divisor_C(self) -> Floats:
        return np.maximum(self.ragged.tokens_C, 1).astype(self.dtype)

    @cached_property
    def logp_C(self) -> Floats:
        return self._sums(self.logp_T)

    @cached_property
    def old_C(self) -> Floats:
        return self._sums(self.old_T)

    @cached_property
    def mu_C(self) -> Floats:
        return self._sums(self.mu_T)

    def _sums(self, given_T: Tensor | None) -> Floats:
        """Per chunk. In fp64 where the ratio is of sums: no division by the length makes their rounding small."""
        assert given_T is not None
        accumulator = None if self.rule.ratio_mean else np.float64
        return _segment_sums(widen(given_T), self.ragged.chunk_offsets, accumulator, self.ragged.filled_C)


class Parts(NamedTuple):
    loss: Tensor
    gradient_U: Tensor
    return_C: Tensor
    weight_U: Tensor
    log_ratio_U: Tensor
    log_mismatch_U: Tensor
    mask_U: Tensor
    tokens_U: Tensor
    positive_U: Tensor


# Overflow to inf, underflow to 0 and NaN are values here, dealt with by bounds and mask.
@np.errstate(all="ignore")
def forward(tokens: Tokens, rewards: Rewards, normalizer: float | None) -> Parts:
    logp_T, rule, ragged = tokens.logp_T, tokens.rule, tokens.ragged
    assert logp_T is not None
    dtype = tokens.dtype
    log_mismatch_U, mask_U, kept_U = mask(tokens)
    log_ratio_U = _mean_log(tokens, "ratio").astype(dtype, copy=False)
    return_C: Floats = _returns(rewards, ragged, rule.gamma).astype(dtype)
    return_U: Floats = np.repeat(return_C, ragged.lengths_C) if rule.per_token else return_C

    positive_U = return_U > 0
    ratio_U = np.exp(log_ratio_U)
    above_U, below_U = (ratio_U.clip(dtype(a), dtype(b)) for a, b in (rule.clip_positive, rule.clip_negative))
    factor_U = np.where(positive_U, above_U, below_U)
    if rule.beyond == "drop":
        factor_U = np.where(ratio_U == factor_U, factor_U, 0)
    weight_U = factor_U * (return_U * mask_U)
    logp_U = widen(logp_T) if rule.per_token else tokens.logp_C
    term_U = weight_U * logp_U
    total = term_U.sum(dtype=np.float64)
    if not np.isfinite(total):
        # A weight of 0 takes its tokens out whatever they hold: 0 * -inf is not 0. Rare, and np.where is slow.
        weight_U = np.where(mask_U & (return_U != 0), weight_U, 0)
        term_U = np.where(weight_U != 0, term_U, 0)
        total = term_U.sum(dtype=np.float64)
    if normalizer is not None:
        z = normalizer
    elif rule.normalization == "token":
        z = float(kept_U.sum())
    else:
        z = normalizer_of(rule, counts(kept_U, ragged.unit_offsets(rule.per_token)))
    scale = -1 / z if z > 0 else 0.0
    if rule.normalization == "sequence_token":
        unit_offsets = ragged.unit_offsets(rule.per_token)
        kept_N = np.maximum(_segment_sums(kept_U, unit_offsets), 1)
        scale_U = scale / np.repeat(kept_N, np.diff(unit_offsets))
        total, gradient_U = (term_U * scale_U).sum(), (weight_U * scale_U).astype(dtype)
    else:
        total, gradient_U = total * scale, weight_U * dtype(scale)
    tokens_U = tokens_of_units(tokens)
    loss = np.asarray(total, dtype)
    arrays = (loss, gradient_U, return_C, weight_U, log_ratio_U, log_mismatch_U, mask_U, tokens_U, positive_U)
    return Parts(*map(torch.from_numpy, arrays))


def expand(ragged: Ragged, gradient_C: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.repeat(gradient_C.numpy(), ragged.lengths_C)).to(dtype)


@np.errstate(all="ignore")
def mask(tokens: Tokens) -> tuple[Floats, Flags, Integers]:
    """Mean log(pi_old / mu), whether it lies within the bounds, and the tokens let through, per unit."""
    dtype, tokens_U = tokens.dtype, tokens_of_units(tokens)
    if tokens.mu_T is None or tokens.old_T is None:
        log_mismatch_U = np.zeros(len(tokens_U), dtype)
    else:
        log_mismatch_U = _mean_log(tokens, "mismatch").astype(dtype, copy=False)
        # -inf - -inf: the engine could not have sampled this.
        np.copyto(log_mismatch_U, np.inf, where=np.isnan(log_mismatch_U))
    log_low, log_high = tokens.rule.log_mask
    mask_U: Flags = (tokens_U > 0) & (log_mismatch_U <= dtype(log_high))
    if log_low > -np.inf:
        mask_U &= log_mismatch_U >= dtype(log_low)
    return log_mismatch_U, mask_U, tokens_U * mask_U


def _mean_log(tokens: Tokens, over: Literal["ratio", "mismatch"]) -> Floats:
    """Mean (or sum) of log(pi / pi_old) or log(pi_old / mu) over its level, per unit, from the tokens that carry the
    loss. A difference of sums, not a sum of differences: each array is read once and nothing of its size written."""
    ragged, rule = tokens.ragged, tokens.rule
    level, mean = (rule.ratio_level, rule.ratio_mean) if over == "ratio" else (rule.mask_level, True)
    if level == "token":
        numerator_T, denominator_T = (tokens.logp_T, tokens.old_T) if over == "ratio" else (tokens.old_T, tokens.mu_T)
        assert numerator_T is not None
        difference_T = widen(numerator_T)
        if denominator_T is not None:
            difference_T = difference_T - widen(denominator_T)
        return np.where(tokens_of_units(tokens) > 0, difference_T, 0)
    if over == "mismatch":
        value_C = tokens.old_C - tokens.mu_C
    else:
        value_C = tokens.logp_C if tokens.old_T is None else tokens.logp_C - tokens.old_C
    if ragged.carry_C is not None:
        value_C = np.where(ragged.carry_C, value_C, 0)
    if level == "sequence":
        value_N = _segment_sums(value_C, ragged.trajectory_offsets, np.float64)
        if mean:
            value_N /= np.maximum(_segment_sums(ragged.tokens_C, ragged.trajectory_offsets), 1)
        value_C = np.where(ragged.tokens_C > 0, np.repeat(value_N, ragged.chunks_N), 0)
    elif mean:
        value_C = value_C / tokens.divisor_C
    return np.repeat(value_C, ragged.lengths_C) if rule.per_token else value_C


def _returns(rewards: Rewards, ragged: Ragged, gamma: float) -> Floats:
    """G_k of eq. 7: the advantage of the trajectory in closed form, intrinsic rewards, which are rare, by a scan."""
    return_C: Floats = np.repeat(rewards.advantage_N, ragged.chunks_N)
    if gamma != 1 or rewards.outcome_N is not None:
        outcome_N = ragged.trajectory_offsets[1:] - 1 if rewards.outcome_N is None else rewards.outcome_N
        ahead_C = np.repeat(outcome_N, ragged.chunks_N) - np.arange(ragged.C)  # chunks from k to j
        powers = gamma ** np.arange(ragged.chunks_N.max(initial=1))
        return_C = np.where(ahead_C >= 0, powers[ahead_C] * return_C, 0)
    return return_C if rewards.intrinsic_C is None else return_C + _scan(rewards.intrinsic_C, ragged, gamma)


def _scan(reward_C: Floats, ragged: Ragged, gamma: float) -> Floats:
    """G_k = r_k + gamma G_{k+1} within each trajectory, in log2(longest) doublings: after i of them G_k holds the
    2^i rewards from k on. The tree depends on nothing but the place in the trajectory."""
    return_C = reward_C.astype(np.float64)
    step, factor, longest = 1, gamma, int(ragged.chunks_N.max(initial=0))
    following_C = np.repeat(ragged.trajectory_offsets[1:], ragged.chunks_N) - np.arange(ragged.C) - 1
    while step < longest:
        return_C[:-step] += np.where(following_C[:-step] >= step, factor * return_C[step:], 0)
        step, factor = 2 * step, factor * factor
    return return_C


def tokens_of_units(tokens: Tokens) -> Integers:
    ragged = tokens.ragged
    if not tokens.rule.per_token:
        return ragged.tokens_C
    return np.repeat((ragged.tokens_C > 0).astype(np.int64), ragged.lengths_C)


def counts(kept_U: Integers, unit_offsets: Integers) -> Counts:
    kept_N = _segment_sums(kept_U, unit_offsets)
    return Counts(int(kept_N.sum()), int(np.count_nonzero(kept_N)))


def widen(tensor: Tensor) -> Floats:
    """As numpy, without a copy where it is fp32 or fp64 already."""
    wide = tensor.detach()
    array: Floats = (wide if wide.dtype in (torch.float32, torch.float64) else wide.float()).numpy()
    return array


def _segment_sums(
    values: npt.NDArray[Any], offsets: Integers, dtype: Any = None, filled: Flags | None = None
) -> npt.NDArray[Any]:
    """Sum over [offsets[i], offsets[i + 1]), 0 where that is empty; `filled` where it is not, if known."""
    starts = offsets[:-1]
    filled = starts < offsets[1:] if filled is None else filled
    if len(starts) and filled.all():
        return np.add.reduceat(values, starts, dtype=dtype)
    sums = np.zeros(len(starts), dtype or values.dtype)
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=dtype)
    return sums
