"""The CPU path: numpy, whose `reduceat` sums each segment pairwise and by itself, four times faster than torch's
`index_add_` or `segment_reduce` here.

Axes: T action tokens, C chunks, N trajectories, U units (chunks, or tokens where a level is "token").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .reference import Counts, Level, Weighting, normalizer_of
from .tiles import Flags, Floats, Integers, Ragged


class Tokens(NamedTuple):
    logp_T: Tensor | None
    old_T: Tensor | None
    mu_T: Tensor | None
    ragged: Ragged
    rule: Weighting


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
def forward(tokens: Tokens, reward_C: Floats, normalizer: float | None) -> Parts:
    logp_T, rule, ragged = tokens.logp_T, tokens.rule, tokens.ragged
    assert logp_T is not None
    dtype: type[Any] = np.float64 if logp_T.dtype == torch.float64 else np.float32
    log_mismatch_U, mask_U, kept_U = mask(tokens)
    log_ratio_U = _mean_log(tokens, logp_T, tokens.old_T, rule.ratio_level, rule.ratio_mean).astype(dtype)
    return_C: Floats = _returns(reward_C, ragged, rule.gamma).astype(dtype)
    return_U: Floats = np.repeat(return_C, ragged.lengths_C) if rule.per_token else return_C

    positive_U = return_U > 0
    low_U, high_U = (
        np.where(positive_U, dtype(above), dtype(below))
        for above, below in zip(rule.clip_positive, rule.clip_negative, strict=True)
    )
    ratio_U = np.exp(log_ratio_U)
    factor_U = np.clip(ratio_U, low_U, high_U)
    if rule.beyond == "drop":
        factor_U = np.where(ratio_U == factor_U, factor_U, 0)
    carried_U = mask_U & (return_U != 0)
    weight_U = np.where(carried_U, factor_U * return_U, 0).astype(dtype)

    # A weight of 0 takes its tokens out whatever they hold: 0 * -inf is not 0.
    logp_U = _widen(logp_T) if rule.per_token else _segment_sums(_widen(logp_T), ragged.chunk_offsets)
    term_U = np.where(weight_U != 0, -weight_U * logp_U.astype(np.float64), 0)
    unit_offsets = ragged.unit_offsets(rule.per_token)
    loss_N = _segment_sums(term_U, unit_offsets)
    z = normalizer_of(rule, counts(kept_U, unit_offsets)) if normalizer is None else normalizer
    scale = -1 / z if z > 0 else 0.0
    if rule.normalization == "sequence_token":
        kept_N = np.maximum(_segment_sums(kept_U, unit_offsets), 1)
        loss_N = loss_N / kept_N
        gradient_U = weight_U * (scale / np.repeat(kept_N, np.diff(unit_offsets)))
    else:
        gradient_U = weight_U * scale
    loss = np.asarray(-scale * loss_N.sum(), dtype=dtype)
    tokens_U = tokens_of_units(tokens)
    arrays = (gradient_U.astype(dtype), return_C, weight_U, log_ratio_U, log_mismatch_U, mask_U, tokens_U, positive_U)
    return Parts(torch.from_numpy(loss), *map(torch.from_numpy, arrays))


def expand(ragged: Ragged, gradient_C: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.repeat(gradient_C.numpy(), ragged.lengths_C)).to(dtype)


@np.errstate(all="ignore")
def mask(tokens: Tokens) -> tuple[Floats, Flags, Integers]:
    """Mean log(pi_old / mu), whether it lies within the bounds, and the tokens let through, per unit."""
    wide = next(x for x in (tokens.logp_T, tokens.old_T) if x is not None).dtype == torch.float64
    dtype: type[Any] = np.float64 if wide else np.float32
    tokens_U = tokens_of_units(tokens)
    if tokens.mu_T is None or tokens.old_T is None:
        log_mismatch_U = np.zeros(len(tokens_U), dtype)
    else:
        log_mismatch_U = _mean_log(tokens, tokens.old_T, tokens.mu_T, tokens.rule.mask_level, True).astype(dtype)
        # -inf - -inf: the engine could not have sampled this.
        log_mismatch_U[np.isnan(log_mismatch_U)] = np.inf
    log_low, log_high = (dtype(bound) for bound in tokens.rule.log_mask)
    mask_U: Flags = (tokens_U > 0) & (log_mismatch_U >= log_low) & (log_mismatch_U <= log_high)
    return log_mismatch_U, mask_U, np.where(mask_U, tokens_U, 0)


def _mean_log(tokens: Tokens, numerator_T: Tensor, denominator_T: Tensor | None, level: Level, mean: bool) -> Floats:
    """Mean (or sum) of numerator - denominator over a level, per unit, from the tokens that carry the loss."""
    ragged, per_token = tokens.ragged, tokens.rule.per_token
    difference_T = _widen(numerator_T)
    if denominator_T is not None:
        difference_T = difference_T - _widen(denominator_T)
    if level == "token":
        return np.where(tokens_of_units(tokens) > 0, difference_T, 0)
    value_C = _segment_sums(difference_T, ragged.chunk_offsets).astype(np.float64)
    if ragged.carry_C is not None:
        value_C = np.where(ragged.carry_C, value_C, 0)
    if level == "sequence":
        value_N = _segment_sums(value_C, ragged.trajectory_offsets)
        if mean:
            value_N /= np.maximum(_segment_sums(ragged.tokens_C, ragged.trajectory_offsets), 1)
        value_C = np.where(ragged.tokens_C > 0, np.repeat(value_N, ragged.chunks_N), 0)
    elif mean:
        value_C /= np.maximum(ragged.tokens_C, 1)
    return np.repeat(value_C, ragged.lengths_C) if per_token else value_C


def _returns(reward_C: Floats, ragged: Ragged, gamma: float) -> Floats:
    """G_k = r_k + gamma G_{k+1} within each trajectory, in log2(longest) doublings: after i of them G_k holds the
    2^i rewards from k on. The tree depends on nothing but the place in the trajectory."""
    return_C = reward_C.copy()
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
    return Counts(int(kept_N.sum()), int((kept_N > 0).sum()))


def _widen(tensor: Tensor) -> Floats:
    """As numpy, without a copy where it is fp32 or fp64 already."""
    wide = tensor.detach()
    array: Floats = (wide if wide.dtype in (torch.float32, torch.float64) else wide.float()).numpy()
    return array


def _segment_sums(values: npt.NDArray[Any], offsets: Integers) -> npt.NDArray[Any]:
    """Sum over [offsets[i], offsets[i + 1]), 0 where that is empty."""
    starts, filled = offsets[:-1], offsets[:-1] < offsets[1:]
    if len(starts) and filled.all():
        return np.add.reduceat(values, starts)
    sums = np.zeros(len(starts), values.dtype)
    if filled.any():
        sums[filled] = np.add.reduceat(values, starts[filled])
    return sums
