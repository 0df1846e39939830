"""The CUDA path: uploads the layout, launches the kernels, hands back what `cpu` would. Not yet run on a GPU.

Axes: T action tokens, C chunks, N trajectories, P pieces, U units (chunks, or tokens where a level is "token").
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import kernel, tiles
from .cpu import Parts, Tokens, tokens_of_units
from .reference import Counts, Level, normalizer_of
from .tiles import Floats, Ragged


def forward(tokens: Tokens, reward_C: Floats, normalizer: float | None) -> tuple[Parts, partial[Tensor]]:
    """What `cpu.forward` gives, and how to spread the gradient of each chunk over its tokens."""
    logp_T, rule, ragged = tokens.logp_T, tokens.rule, tokens.ragged
    assert logp_T is not None
    device, dtype = logp_T.device, torch.float64 if logp_T.dtype == torch.float64 else torch.float32
    pieces, piece_offsets = (_upload(array, device) for array in tiles.cut(ragged))
    tokens_C = _upload(ragged.tokens_C, device)
    sums_C = _segment_sums(_piece_sums(tokens, pieces, tokens_C, dtype), piece_offsets)
    return_C = _returns(reward_C, ragged, rule.gamma, device, dtype)

    def to_units(values_C: Tensor) -> Tensor:
        return _spread(values_C, ragged.lengths_C) if rule.per_token else values_C

    def over(level: Level, row: int) -> tuple[Tensor, Tensor]:
        """A sum over the level, and the tokens it is of, for each unit."""
        if level == "token":
            minuend, subtrahend = ((logp_T, tokens.old_T), (tokens.old_T, tokens.mu_T))[row]
            difference = torch.zeros_like(logp_T, dtype=dtype) if minuend is None else minuend.to(dtype)
            if subtrahend is not None:
                difference = difference - subtrahend.to(dtype)
            elif row == 1:
                difference = torch.zeros_like(difference)
            return difference, torch.ones_like(difference, dtype=torch.int32)
        if level == "chunk":
            return to_units(sums_C[row]), to_units(tokens_C)
        sums_N = _segment_sums(sums_C, _upload(ragged.trajectory_offsets, device))[row]
        tokens_N = np.add.reduceat(np.append(ragged.tokens_C, 0), ragged.trajectory_offsets[:-1])
        by_chunk = np.repeat(tokens_N, ragged.chunks_N)  # an empty trajectory's sum is wrong, and repeated 0 times
        return to_units(_spread(sums_N, ragged.chunks_N)), to_units(_upload(by_chunk, device))

    logp_U = logp_T.to(dtype) if rule.per_token else sums_C[2]
    tokens_U = _upload(tokens_of_units(tokens), device)
    return_U = to_units(return_C)
    weight_U, log_ratio_U, log_mismatch_U, mask_U, term_U = _weigh(
        tokens, *over(rule.ratio_level, 0), *over(rule.mask_level, 1), logp_U, tokens_U, return_U
    )

    unit_offsets = ragged.unit_offsets(rule.per_token)
    units_N = np.diff(unit_offsets)
    kept_U = torch.where(mask_U, tokens_U, 0)
    kept_N = None
    if rule.normalization != "token" or normalizer is None:
        # Differences of a running sum: exact, these are integers.
        running = torch.cat([kept_U.new_zeros(1), kept_U]).cumsum(0)
        kept_N = running[_upload(unit_offsets, device, np.int64)].diff()
    z = normalizer
    if z is None:
        assert kept_N is not None
        z = normalizer_of(rule, Counts(int(kept_N.sum()), int((kept_N > 0).sum())))
    scale = -1 / z if z > 0 else 0.0
    if rule.normalization == "sequence_token":
        assert kept_N is not None
        each_U = _spread(kept_N.clamp(min=1), units_N)
        term_U, gradient_U = term_U / each_U, weight_U * (scale / each_U)
    else:
        gradient_U = weight_U * scale
    loss = (-scale * term_U.sum(dtype=torch.float64)).to(dtype)
    parts = Parts(
        loss,
        gradient_U.to(dtype),
        return_C,
        weight_U,
        log_ratio_U,
        log_mismatch_U,
        mask_U,
        tokens_U.long(),
        return_U > 0,
    )
    return parts, partial(expand, pieces, logp_T.shape[0])


def expand(pieces: Tensor, total: int, gradient_C: Tensor, dtype: torch.dtype) -> Tensor:
    gradient_T = torch.empty(total, dtype=dtype, device=gradient_C.device)
    P = pieces.shape[1]
    if P:
        shape = tiles.tile(gradient_C.dtype.itemsize)
        kernel.expand_kernel[_grid(P, shape, pieces)](
            gradient_C, pieces, gradient_T, P, ROWS=shape.rows, PIECE=shape.piece, num_warps=shape.warps
        )
    return gradient_T


def _piece_sums(tokens: Tokens, pieces: Tensor, tokens_C: Tensor, dtype: torch.dtype) -> Tensor:
    assert tokens.logp_T is not None
    logp_T = tokens.logp_T.contiguous()
    # A missing array is never read: any pointer does.
    old_T, mu_T = (logp_T if given is None else given.detach().contiguous() for given in (tokens.old_T, tokens.mu_T))
    P = pieces.shape[1]
    sums_P = torch.empty(3, P, dtype=dtype, device=logp_T.device)
    if P:
        shape = tiles.tile(dtype.itemsize)
        kernel.piece_sums_kernel[_grid(P, shape, pieces)](
            logp_T,
            old_T,
            mu_T,
            pieces,
            tokens_C,
            sums_P,
            P,
            HAS_OLD=tokens.old_T is not None,
            HAS_MU=tokens.mu_T is not None,
            ACC=_triton(dtype),
            ROWS=shape.rows,
            PIECE=shape.piece,
            num_warps=shape.warps,
        )
    return sums_P


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """[3, V] to [3, S] by int32 offsets [S + 1]."""
    S = len(offsets) - 1
    sums = torch.empty(3, S, dtype=values.dtype, device=values.device)
    if S:
        kernel.segment_sums_kernel[(-(-S // tiles.SEGMENT_ROWS),)](
            values,
            offsets,
            sums,
            values.shape[1],
            S,
            ACC=_triton(values.dtype),
            ROWS=tiles.SEGMENT_ROWS,
            LANES=tiles.SEGMENT_LANES,
        )
    return sums


def _returns(reward_C: Floats, ragged: Ragged, gamma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return_C = torch.empty(ragged.C, dtype=dtype, device=device)
    if ragged.C:
        kernel.returns_kernel[(ragged.N,)](
            _upload(reward_C, device, np.float64),
            _upload(ragged.trajectory_offsets, device),
            return_C,
            GAMMA=float(gamma),
            BLOCK=tiles.SCAN,
        )
    return return_C


def _weigh(tokens: Tokens, ratio_U: Tensor, *others: Tensor) -> list[Tensor]:
    """`weigh_kernel` over all units: weight, log-ratio, log-mismatch, mask, term of the loss."""
    U, rule = len(ratio_U), tokens.rule
    out = [torch.empty(U, dtype=ratio_U.dtype, device=ratio_U.device) for _ in range(5)]
    out[3] = torch.empty(U, dtype=torch.int8, device=ratio_U.device)
    if U:
        log_low, log_high = rule.log_mask
        kernel.weigh_kernel[(-(-U // tiles.UNITS),)](
            ratio_U,
            *others,
            *out,
            U,
            LOW_POSITIVE=float(rule.clip_positive[0]),
            HIGH_POSITIVE=float(rule.clip_positive[1]),
            LOW_NEGATIVE=float(rule.clip_negative[0]),
            HIGH_NEGATIVE=float(rule.clip_negative[1]),
            DROP=rule.beyond == "drop",
            RATIO_MEAN=rule.ratio_mean,
            LOG_LOW=log_low,
            LOG_HIGH=log_high,
            BLOCK=tiles.UNITS,
        )
    out[3] = out[3].bool()
    return out


def _grid(pieces: int, shape: tiles.Tile, on: Tensor) -> tuple[int]:
    processors = torch.cuda.get_device_properties(on.device).multi_processor_count if on.is_cuda else 1
    return (tiles.programs(pieces, shape.rows, processors),)


def _triton(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _upload(array: Any, device: torch.device, kind: Any = np.int32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device, non_blocking=True)


def _spread(values: Tensor, lengths: Any) -> Tensor:
    """Each value `lengths` times; the total is known, so nothing waits for the device."""
    return torch.repeat_interleave(values, _upload(lengths, values.device, np.int64), output_size=int(lengths.sum()))
