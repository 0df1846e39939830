# mypy: ignore-errors
"""Triton kernels of `grouped_gemm`. Equations and layouts are in README.md.

Axes: M rows sorted by expert, E experts, K inputs, N outputs. `LANES_E` is E rounded up to a power of two. An operand
named `x`, `w` or `dy` is a TMA tensor descriptor where its `*_TMA` flag is set, else a pointer.
`UPCAST` multiplies in fp32: Triton's interpreter gets products of bf16 wrong.
"""

import triton
import triton.language as tl


@triton.jit
def _bounds(ends_ptr, E, LANES_E: tl.constexpr):
    """First row and row after the last of every expert; lanes past E hold no rows."""
    lane_E = tl.arange(0, LANES_E)
    begin_E = tl.load(ends_ptr + lane_E - 1, mask=(lane_E > 0) & (lane_E < E), other=0)
    end_E = tl.load(ends_ptr + lane_E, mask=lane_E < E, other=0)
    return lane_E, begin_E, end_E


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load_weight(
    w, expert, k_BK, n_BN, k0, n0, K, N, stride_e, stride_k, stride_n,
    TMA: tl.constexpr, K_MAJOR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The [BLOCK_K, BLOCK_N] tile of one expert's matrix; zero beyond its edges."""
    if TMA:
        if K_MAJOR:  # stored [E, N, K], as checkpoints store it
            return w.load([expert, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
        else:
            return w.load([expert, k0, n0]).reshape(BLOCK_K, BLOCK_N)
    else:
        at = expert.to(tl.int64) * stride_e + k_BK.to(tl.int64)[:, None] * stride_k + n_BN[None, :] * stride_n
        return tl.load(w + at, mask=(k_BK[:, None] < K) & (n_BN[None, :] < N), other=0.0)


@triton.jit
def grouped_gemm_kernel(
    x, w, y_ptr, pre_ptr, ends_ptr, gather_ptr, scatter_ptr, scale_ptr,
    E, K, N,
    stride_xm, stride_xk, stride_we, stride_wk, stride_wn,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, SCALE: tl.constexpr,
    SWIGLU: tl.constexpr, STORE_PRE: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    LANES_E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`y[out(m)] = scale[out(m)] * act(x[in(m)] @ w[e(m)])`; y is [M, N], pre is [M, 2N], both contiguous.

    Persistent: program p of P takes tiles p, p + P, ... of all experts. N counts columns of y; with SWIGLU the gate
    is columns [0, N) of w and the up projection columns [N, 2N).
    """
    lane_E, begin_E, end_E = _bounds(ends_ptr, E, LANES_E)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_end_E = tl.cumsum(tl.cdiv(end_E - begin_E, BLOCK_M) * tiles_n, 0)
    columns = 2 * N if SWIGLU else N
    for tile in range(tl.program_id(0), tl.max(tile_end_E), tl.num_programs(0)):
        expert = tl.sum((tile_end_E <= tile).to(tl.int32))
        begin = tl.sum(tl.where(lane_E == expert, begin_E, 0))
        end = tl.sum(tl.where(lane_E == expert, end_E, 0))
        local = tile - tl.sum(tl.where(lane_E == expert - 1, tile_end_E, 0))
        # GROUP_M row tiles share their columns of w while these are in L2
        strip = local // (GROUP_M * tiles_n)
        height = tl.minimum(tl.cdiv(end - begin, BLOCK_M) - strip * GROUP_M, GROUP_M)
        within = local % (GROUP_M * tiles_n)
        m0 = begin + (strip * GROUP_M + within % height) * BLOCK_M
        n0 = within // height * BLOCK_N

        m_BM = m0 + tl.arange(0, BLOCK_M)
        n_BN = n0 + tl.arange(0, BLOCK_N)
        is_row_BM = m_BM < end
        if GATHER:
            in_BM = tl.load(gather_ptr + m_BM, mask=is_row_BM, other=0) // TOP_K
        else:
            in_BM = m_BM
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k_BK = k0 + tl.arange(0, BLOCK_K)
            if X_TMA:
                a = x.load([m0, k0])  # rows past `end` are another expert's: computed, never stored
            else:
                at = in_BM.to(tl.int64)[:, None] * stride_xm + k_BK[None, :] * stride_xk
                a = tl.load(x + at, mask=is_row_BM[:, None] & (k_BK[None, :] < K), other=0.0)
            b = _load_weight(
                w, expert, k_BK, n_BN, k0, n0, K, columns, stride_we, stride_wk, stride_wn,
                W_TMA, W_K_MAJOR, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            acc = _dot(a, b, acc, PRECISION, UPCAST)
            if SWIGLU:
                b = _load_weight(
                    w, expert, k_BK, n_BN + N, k0, n0 + N, K, columns, stride_we, stride_wk, stride_wn,
                    W_TMA, W_K_MAJOR, BLOCK_K, BLOCK_N,
                )  # fmt: skip
                up = _dot(a, b, up, PRECISION, UPCAST)

        inside = is_row_BM[:, None] & (n_BN[None, :] < N)
        if STORE_PRE:
            pre = pre_ptr + m_BM.to(tl.int64)[:, None] * (2 * N) + n_BN[None, :]
            tl.store(pre, acc.to(pre_ptr.dtype.element_ty), mask=inside)
            tl.store(pre + N, up.to(pre_ptr.dtype.element_ty), mask=inside)
        if SWIGLU:
            acc = acc * tl.sigmoid(acc) * up
        if SCATTER:
            out_BM = tl.load(scatter_ptr + m_BM, mask=is_row_BM, other=0)
        else:
            out_BM = m_BM
        if SCALE:
            acc = acc * tl.load(scale_ptr + out_BM, mask=is_row_BM, other=0.0).to(tl.float32)[:, None]
        y = y_ptr + out_BM.to(tl.int64)[:, None] * N + n_BN[None, :]
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_rows(
    source, row_BM, in_BM, col, m0, col0, end, columns, stride_m, stride_col,
    TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows `row_BM` of one expert, columns `col`; in the tail, rows past `end` are zero and never multiplied."""
    if TMA:
        tile = source.load([m0, col0])
        if TAIL:
            tile = tl.where(row_BM[:, None] < end, tile, 0.0)
    else:
        at = in_BM.to(tl.int64)[:, None] * stride_m + col[None, :] * stride_col
        tile = tl.load(source + at, mask=(row_BM[:, None] < end) & (col[None, :] < columns), other=0.0)
    return tile


@triton.jit
def _gathered(index_ptr, row_BM, end, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    if GATHER:
        return tl.load(index_ptr + row_BM, mask=row_BM < end, other=0) // TOP_K
    else:
        return row_BM


@triton.jit
def grouped_weight_grad_kernel(
    x, dy, dw_ptr, ends_ptr, gather_x_ptr, gather_dy_ptr,
    E, K, N,
    stride_xm, stride_xk, stride_dm, stride_dn, stride_we, stride_wk, stride_wn,
    TOP_K: tl.constexpr, GATHER_X: tl.constexpr, GATHER_DY: tl.constexpr, X_TMA: tl.constexpr, DY_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_K: tl.constexpr,
    LANES_E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`dw[e] = sum over the rows m of e of x[in(m)]^T dy[out(m)]`; an expert without rows gets zeros.

    Persistent over the [BLOCK_K, BLOCK_N] tiles of all experts. One program sums all rows of a tile in order: no
    atomics, so the same input gives the same bits.
    """
    lane_E, begin_E, end_E = _bounds(ends_ptr, E, LANES_E)
    tiles_k, tiles_n = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), E * tiles_k * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_k * tiles_n)
        begin = tl.sum(tl.where(lane_E == expert, begin_E, 0))
        end = tl.sum(tl.where(lane_E == expert, end_E, 0))
        local = tile % (tiles_k * tiles_n)
        strip = local // (GROUP_K * tiles_n)
        height = tl.minimum(tiles_k - strip * GROUP_K, GROUP_K)
        within = local % (GROUP_K * tiles_n)
        k0 = (strip * GROUP_K + within % height) * BLOCK_K
        n0 = within // height * BLOCK_N
        k_BK = k0 + tl.arange(0, BLOCK_K)
        n_BN = n0 + tl.arange(0, BLOCK_N)

        acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
        full = begin + (end - begin) // BLOCK_M * BLOCK_M
        for m0 in range(begin, full, BLOCK_M):
            row_BM = m0 + tl.arange(0, BLOCK_M)
            x_BM = _gathered(gather_x_ptr, row_BM, end, TOP_K, GATHER_X)
            dy_BM = _gathered(gather_dy_ptr, row_BM, end, 1, GATHER_DY)
            a = _load_rows(x, row_BM, x_BM, k_BK, m0, k0, end, K, stride_xm, stride_xk, X_TMA, False)
            b = _load_rows(dy, row_BM, dy_BM, n_BN, m0, n0, end, N, stride_dm, stride_dn, DY_TMA, False)
            acc = _dot(a.T, b, acc, PRECISION, UPCAST)
        if full < end:
            row_BM = full + tl.arange(0, BLOCK_M)
            x_BM = _gathered(gather_x_ptr, row_BM, end, TOP_K, GATHER_X)
            dy_BM = _gathered(gather_dy_ptr, row_BM, end, 1, GATHER_DY)
            a = _load_rows(x, row_BM, x_BM, k_BK, full, k0, end, K, stride_xm, stride_xk, X_TMA, True)
            b = _load_rows(dy, row_BM, dy_BM, n_BN, full, n0, end, N, stride_dm, stride_dn, DY_TMA, True)
            acc = _dot(a.T, b, acc, PRECISION, UPCAST)

        dw = dw_ptr + expert.to(tl.int64) * stride_we
        dw += k_BK.to(tl.int64)[:, None] * stride_wk + n_BN.to(tl.int64)[None, :] * stride_wn
        tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=(k_BK[:, None] < K) & (n_BN[None, :] < N))


@triton.jit
def swiglu_backward_kernel(
    pre_ptr, dh_ptr, dpre_ptr, h_ptr, scale_ptr, scatter_ptr, dscale_ptr,
    M, N,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of `h = silu(gate) * up` from the saved `pre = [gate, up]`; h itself is recomputed, not saved.

    With SCALE, dh comes without its row's scale s: writes `dscale[out(m)] = <h, dh>`, uses `s * dh`, and writes
    `s * h`, which the gradient of the next weight needs. All arrays are contiguous.
    """
    m_BM = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row_BM = m_BM < M
    scale_BM = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if SCALE:
        out_BM = tl.load(scatter_ptr + m_BM, mask=is_row_BM, other=0)
        scale_BM = tl.load(scale_ptr + out_BM, mask=is_row_BM, other=0.0).to(tl.float32)
    dscale_BM = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n_BN = n0 + tl.arange(0, BLOCK_N)
        inside = is_row_BM[:, None] & (n_BN[None, :] < N)
        at = m_BM.to(tl.int64)[:, None] * N + n_BN[None, :]
        at_pre = m_BM.to(tl.int64)[:, None] * (2 * N) + n_BN[None, :]
        gate = tl.load(pre_ptr + at_pre, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre_ptr + at_pre + N, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if SCALE:
            dscale_BM += tl.sum(silu * up * dh, 1)
            tl.store(h_ptr + at, (silu * up * scale_BM[:, None]).to(h_ptr.dtype.element_ty), mask=inside)
            dh *= scale_BM[:, None]
        dgate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(dpre_ptr + at_pre, dgate.to(dpre_ptr.dtype.element_ty), mask=inside)
        tl.store(dpre_ptr + at_pre + N, (dh * silu).to(dpre_ptr.dtype.element_ty), mask=inside)
    if SCALE:
        tl.store(dscale_ptr + out_BM, dscale_BM.to(dscale_ptr.dtype.element_ty), mask=is_row_BM)
