# mypy: ignore-errors
"""Triton kernels of `linear_logprob`. Equations are in README.md.

Axes: T tokens, V vocabulary, D hidden, S slices of the vocabulary. `h` and `w` are TMA tensor descriptors where `TMA`
is set, else pointers. `UPCAST` multiplies in fp32: Triton's interpreter gets products of bf16 wrong.
"""

import triton
import triton.language as tl


@triton.jit
def _logits(
    h, w, t0, v0, T, V, D, stride_ht, stride_hd, stride_wv, stride_wd,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The [BLOCK_T, BLOCK_V] tile of `h @ w^T` in fp32; rows and columns beyond T and V are zero, TMA or not."""
    t_BT = t0 + tl.arange(0, BLOCK_T)
    v_BV = v0 + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        if TMA:
            a = h.load([t0, d0])
            b = w.load([v0, d0])
        else:
            d_BD = d0 + tl.arange(0, BLOCK_D)
            at_h = t_BT.to(tl.int64)[:, None] * stride_ht + d_BD[None, :] * stride_hd
            a = tl.load(h + at_h, mask=(t_BT[:, None] < T) & (d_BD[None, :] < D), other=0.0)
            at_w = v_BV.to(tl.int64)[:, None] * stride_wv + d_BD[None, :] * stride_wd
            b = tl.load(w + at_w, mask=(v_BV[:, None] < V) & (d_BD[None, :] < D), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return t_BT, v_BV, acc


@triton.jit
def linear_logprob_kernel(
    h, w, token_ptr, max_ptr, sum_ptr, dot_ptr, chosen_ptr,
    T, V, D, tiles_per_slice, inverse_temperature,
    stride_ht, stride_hd, stride_wv, stride_wd,
    ENTROPY: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of the vocabulary for one tile of tokens: max, sum of exp, sum of exp * logit, the chosen logit.

    Programs that run together differ in their tokens first, so that they read the same rows of w from L2.
    """
    tiles_t = tl.cdiv(T, BLOCK_T)
    part = tl.program_id(0) // tiles_t
    t0 = tl.program_id(0) % tiles_t * BLOCK_T
    t_BT = t0 + tl.arange(0, BLOCK_T)
    token_BT = tl.load(token_ptr + t_BT, mask=t_BT < T, other=-1)
    highest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    dot = tl.zeros((BLOCK_T,), dtype=tl.float32)
    first = part * tiles_per_slice * BLOCK_V
    last = tl.minimum(first + tiles_per_slice * BLOCK_V, V)
    for v0 in range(first, last, BLOCK_V):
        t_BT, v_BV, logits = _logits(
            h, w, t0, v0, T, V, D, stride_ht, stride_hd, stride_wv, stride_wd,
            TMA, UPCAST, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        logits = tl.where(v_BV[None, :] < V, logits * inverse_temperature, float("-inf"))
        new = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp(highest - new)
        weight = tl.exp(logits - new[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if ENTROPY:
            finite = tl.where(v_BV[None, :] < V, logits, 0.0)
            dot = dot * shrink + tl.sum(weight * finite, 1)
        highest = new
        is_chosen = v_BV[None, :] == token_BT[:, None]
        chosen = tl.sum(tl.where(is_chosen, logits, 0.0), 1)
        tl.store(chosen_ptr + t_BT, chosen, mask=(t_BT < T) & (token_BT >= v0) & (token_BT < v0 + BLOCK_V))
    at = part.to(tl.int64) * T + t_BT
    tl.store(max_ptr + at, highest, mask=t_BT < T)
    tl.store(sum_ptr + at, total, mask=t_BT < T)
    if ENTROPY:
        tl.store(dot_ptr + at, dot, mask=t_BT < T)


@triton.jit
def logits_grad_kernel(
    h, w, token_ptr, lse_ptr, mean_ptr, dlogp_ptr, dentropy_ptr, out_ptr,
    T, V, D, inverse_temperature, begin_v, end_v,
    stride_ht, stride_hd, stride_wv, stride_wd,
    ENTROPY: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the tempered logits for words [begin_v, end_v), logits recomputed; out is [T, end_v - begin_v]."""
    tiles_t, tiles_v = tl.cdiv(T, BLOCK_T), tl.cdiv(end_v - begin_v, BLOCK_V)
    strip = tl.program_id(0) // (GROUP_T * tiles_v)
    height = tl.minimum(tiles_t - strip * GROUP_T, GROUP_T)
    within = tl.program_id(0) % (GROUP_T * tiles_v)
    t0 = (strip * GROUP_T + within % height) * BLOCK_T
    v0 = begin_v + within // height * BLOCK_V
    t_BT, v_BV, logits = _logits(
        h, w, t0, v0, T, V, D, stride_ht, stride_hd, stride_wv, stride_wd,
        TMA, UPCAST, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits *= inverse_temperature
    is_token = t_BT < T
    token_BT = tl.load(token_ptr + t_BT, mask=is_token, other=-1)
    lse_BT = tl.load(lse_ptr + t_BT, mask=is_token, other=0.0)
    dlogp_BT = tl.load(dlogp_ptr + t_BT, mask=is_token, other=0.0)
    slope = dlogp_BT[:, None] + tl.zeros_like(logits)
    if ENTROPY:
        mean_BT = tl.load(mean_ptr + t_BT, mask=is_token, other=0.0)
        dentropy_BT = tl.load(dentropy_ptr + t_BT, mask=is_token, other=0.0)
        slope += dentropy_BT[:, None] * (logits - mean_BT[:, None])
    grad = tl.where(v_BV[None, :] == token_BT[:, None], dlogp_BT[:, None], 0.0)
    grad -= tl.exp(logits - lse_BT[:, None]) * slope
    at = t_BT.to(tl.int64)[:, None] * (end_v - begin_v) + (v_BV - begin_v)[None, :]
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & (v_BV[None, :] < end_v))
