"""`chunk_advantage`: checks, dispatch, autograd.

Axes: T action tokens, C chunks, N trajectories, U units (chunks, or tokens where a level is "token").
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .cpu import Parts, Tokens
from .reference import ChunkAdvantage, Counts, Weighting
from .tiles import Floats, Integers, Ragged, Rewards

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_IPA = Weighting()

# The gradient of each chunk, spread over its tokens, in a dtype.
Expand = Callable[[Tensor, torch.dtype], Tensor]


def chunk_advantage(
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
    """The chunk-level policy gradient of IPA and its relatives over ragged tokens; `weighting` says which of them.

        G_k  = r_k + gamma G_{k+1}, the advantage of the trajectory added to r of its outcome chunk         (eq. 7)
        loss = - sum_u weight_u sum_{t in u} logp_t / Z,     d loss / d logp_t = - weight_u / Z             (eq. 9)

    logp_T            log-probabilities of the action tokens under the policy in training; only it gets a gradient
    logp_old_T        the same under the weights that sampled. None: 0, so a ratio is a probability (q_k of eq. 10)
    logp_mu_T         as the engine sampled them; -inf is masked. None: nothing is masked
    chunk_offsets     int64 [C+1] over tokens; trajectory_offsets int64 [N+1] over chunks; both from 0 and not falling.
                      These and the arrays below are small and belong on the CPU: fetching them from a GPU waits for it
    advantage_N       what plays the terminal reward of each trajectory
    chunk_rewards_C   intrinsic rewards r_k, 0 by default
    outcome_chunk_N   index of the outcome chunk within its trajectory, the last by default; later chunks get 0
    carry_C           bool: the chunks that carry the loss. Values of the others' tokens are never used
    normalizer        the number Z: counted tokens, counted trajectories, or a constant. None: counted in this call.
                      With the count of the whole batch (the sum of `chunk_counts`) the split of a batch into
                      micro-batches never changes the gradient. 0, where everything is masked, gives loss 0

    Reductions are in fp32 or better whatever the dtype; the bits of weights and gradient do not depend on what else is
    in the call. ValueError for shapes, dtypes, devices and offsets that do not fit.
    """
    rule = weighting or _IPA
    ragged = _check(logp_T, logp_old_T, logp_mu_T, chunk_offsets, trajectory_offsets, carry_C)
    rewards = _check_rewards(ragged, advantage_N, chunk_rewards_C, outcome_chunk_N)
    if normalizer is not None and not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer: expected a finite number >= 0, got {normalizer}")
    if rule.normalization == "constant" and not normalizer:
        raise ValueError(f'normalizer: normalization "constant" needs a positive number, got {normalizer}')

    tokens = Tokens(logp_T.detach(), logp_old_T, logp_mu_T, ragged, rule)
    expand: Expand
    if _on_kernel(logp_T):
        from . import cuda  # here, because the CPU path needs no triton

        parts, expand = cuda.forward(tokens, rewards.per_chunk(ragged), normalizer)
    else:
        parts, expand = cpu.forward(tokens, rewards, normalizer), partial(cpu.expand, ragged)
    if rule.per_token:
        expand = Tensor.to
    loss = _Surrogate.apply(logp_T, parts, expand)  # type: ignore[no-untyped-call]
    return ChunkAdvantage(loss, rule, *parts[2:])


def chunk_counts(
    logp_old_T: Tensor,
    logp_mu_T: Tensor | None,
    chunk_offsets: Tensor,
    trajectory_offsets: Tensor,
    *,
    weighting: Weighting | None = None,
    carry_C: Tensor | None = None,
) -> Counts:
    """Tokens and trajectories that the mask lets through. They do not depend on the policy in training, so the
    normaliser of a batch is known before its first gradient: sum this over micro-batches and ranks."""
    rule = weighting or _IPA
    ragged = _check(logp_old_T, None, logp_mu_T, chunk_offsets, trajectory_offsets, carry_C)
    tokens = Tokens(None, logp_old_T, logp_mu_T, ragged, rule)
    if _on_kernel(logp_old_T):
        from . import cuda

        # The ratio is not needed: pi_old stands in for pi, and its second read comes from the cache.
        parts, _ = cuda.forward(replace(tokens, logp_T=logp_old_T), np.zeros(ragged.C), 0.0)
        kept_U = torch.where(parts.mask_U, parts.tokens_U, 0).cpu().numpy()
    else:
        _, _, kept_U = cpu.mask(tokens)
    return cpu.counts(kept_U, ragged.unit_offsets(rule.per_token))


class _Surrogate(torch.autograd.Function):
    """The gradient written down: each token gets that of its unit, - weight / Z."""

    @staticmethod
    def forward(ctx: Any, logp_T: Tensor, parts: Parts, expand: Expand) -> Tensor:
        ctx.save_for_backward(parts.gradient_U)
        ctx.expand, ctx.dtype = expand, logp_T.dtype
        return parts.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_U,) = ctx.saved_tensors
        return ctx.expand(gradient_U * upstream, ctx.dtype), None, None


def _on_kernel(tensor: Tensor) -> bool:
    # Triton's interpreter runs the kernels on CPU tensors; tests do.
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _check(
    logp_T: Tensor,
    old_T: Tensor | None,
    mu_T: Tensor | None,
    chunk_offsets: Tensor,
    trajectory_offsets: Tensor,
    carry_C: Tensor | None,
) -> Ragged:
    if logp_T.dtype not in _DTYPES or logp_T.ndim != 1:
        raise ValueError(f"log-probabilities: expected [T] of {_DTYPES}, got {list(logp_T.shape)} of {logp_T.dtype}")
    if logp_T.device.type not in ("cpu", "cuda"):
        raise ValueError(f"log-probabilities: expected a CPU or CUDA tensor, got one on {logp_T.device}")
    for name, given in (("logp_old_T", old_T), ("logp_mu_T", mu_T)):
        if given is None:
            continue
        if given.shape != logp_T.shape or given.device != logp_T.device or given.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: expected {list(logp_T.shape)} of a float dtype on {logp_T.device}, "
                f"got {list(given.shape)} of {given.dtype} on {given.device}"
            )
    chunks = _check_offsets("chunk_offsets", chunk_offsets, logp_T.shape[0], "tokens")
    trajectories = _check_offsets("trajectory_offsets", trajectory_offsets, len(chunks) - 1, "chunks")
    ragged = Ragged(chunks, trajectories, None if carry_C is None else carry_C.cpu().numpy())
    for name, lengths in (("chunk_offsets", ragged.lengths_C), ("trajectory_offsets", ragged.chunks_N)):
        if lengths.min(initial=0) < 0:
            raise ValueError(f"{name}: expected offsets that do not fall, got a fall at {int(lengths.argmin())}")
    if carry_C is not None and (carry_C.dtype != torch.bool or carry_C.shape != (ragged.C,)):
        raise ValueError(f"carry_C: expected [{ragged.C}] of torch.bool, got {list(carry_C.shape)} of {carry_C.dtype}")
    return ragged


def _check_offsets(name: str, offsets: Tensor, total: int, of: str) -> Integers:
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(
            f"{name}: expected int64 with at least one element, got {list(offsets.shape)} of {offsets.dtype}"
        )
    if total >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2^31 {of} in a call, got {total}")
    values: Integers = offsets.cpu().numpy()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"{name}: expected to run from 0 to the {total} {of}, got {values[0]} to {values[-1]}")
    return values


def _check_vector(name: str, values: Tensor, axis: str, length: int) -> Floats:
    if values.shape != (length,) or not values.is_floating_point():
        raise ValueError(f"{name}: expected a float [{axis}] = [{length}], got {list(values.shape)} of {values.dtype}")
    return cpu.widen(values.cpu())


def _check_rewards(
    ragged: Ragged, advantage_N: Tensor, chunk_rewards_C: Tensor | None, outcome_chunk_N: Tensor | None
) -> Rewards:
    advantages = _check_vector("advantage_N", advantage_N, "N", ragged.N)
    intrinsic = None if chunk_rewards_C is None else _check_vector("chunk_rewards_C", chunk_rewards_C, "C", ragged.C)
    if intrinsic is not None and not intrinsic.any():
        intrinsic = None  # spares the scan
    if outcome_chunk_N is None:
        return Rewards(advantages, None, intrinsic)
    if outcome_chunk_N.dtype != torch.int64 or outcome_chunk_N.shape != (ragged.N,):
        raise ValueError(
            f"outcome_chunk_N: expected int64 [{ragged.N}], "
            f"got {list(outcome_chunk_N.shape)} of {outcome_chunk_N.dtype}"
        )
    outcome: Integers = outcome_chunk_N.cpu().numpy()
    if ((ragged.chunks_N > 0) & ((outcome < 0) | (outcome >= ragged.chunks_N))).any():
        raise ValueError("outcome_chunk_N: expected an index of a chunk of its own trajectory")
    return Rewards(advantages, ragged.trajectory_offsets[:-1] + outcome, intrinsic)
