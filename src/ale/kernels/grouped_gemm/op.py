"""`grouped_gemm`: checks, dispatch on device, launch, autograd. Equations and the backward are in README.md.

Axes: R rows of x, M rows of the product (sorted by expert), E experts, K inputs, N outputs, I = N / 2 with SwiGLU.
The functions below `grouped_gemm` do not check and are not differentiable: `ale.kernels.moe` builds on them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ale.kernels.device import (
    TMA_ALIGNMENT,
    Chip,
    chip_of,
    is_aligned,
    multiplies_in_fp32,
    on_device_of,
    takes_tma,
    under_autocast,
    wide,
)
from ale.kernels.grouped_gemm import tiles

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_gemm(
    x_RK: Tensor,
    w_EKN: Tensor,
    ends_E: Tensor,
    *,
    gather_M: Tensor | None = None,
    scatter_M: Tensor | None = None,
    scale_M: Tensor | None = None,
    top_k: int = 1,
    swiglu: bool = False,
    tf32: bool = False,
) -> Tensor:
    """`y[out(m)] = scale[out(m)] * act(x[in(m)] @ w[e(m)])`, with fp32 accumulation; differentiable in x, w and scale.

    Row m of the product belongs to expert e when `ends_E[e - 1] <= m < ends_E[e]`; the last end is M. Experts may have
    no rows. Inputs may have any strides; `w_EKN.mT` of weights stored [E, N, K] is as good as a dense `w_EKN`.

    - `gather_M` (a permutation of M): `in(m) = gather_M[m] // top_k`, so M = R * top_k. This is a token's row read on
      load by each of its `top_k` experts. Without it `in(m) = m`.
    - `scatter_M` (a permutation of M): `out(m) = scatter_M[m]`, else `out(m) = m`.
    - `scale_M`: one factor per row of y, such as its routing weight.
    - `swiglu`: `act(z) = silu(z[:I]) * z[I:]` and y is [M, I]; excludes `scatter_M` and `scale_M`, which belong to the
      projection after it. Else `act(z) = z` and y is [M, N].
    - `tf32`: multiply fp32 in tf32 on the GPU (10-bit mantissa); no effect on other types.

    CPU tensors take torch's matmuls, CUDA tensors the Triton kernel. Same input, same bits. Reads `ends_E` and the
    permutations on the host to check them, which waits for the GPU. Raises ValueError for what does not fit.
    """
    x_RK, w_EKN = under_autocast(x_RK, w_EKN)
    _check(x_RK, w_EKN, ends_E, gather_M, scatter_M, scale_M, top_k, swiglu)
    ends_E = ends_E.to(torch.int32)
    y: Tensor = _GroupedGemm.apply(  # type: ignore[no-untyped-call]
        x_RK, w_EKN, scale_M, ends_E, gather_M, scatter_M, top_k, swiglu, tf32
    )
    return y


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RK: Tensor,
        w_EKN: Tensor,
        scale_M: Tensor | None,
        ends_E: Tensor,
        gather_M: Tensor | None,
        scatter_M: Tensor | None,
        top_k: int,
        swiglu: bool,
        tf32: bool,
    ) -> Tensor:
        keep_pre = swiglu and any(ctx.needs_input_grad)
        y, pre = gemm(
            x_RK, w_EKN, ends_E, gather_M=gather_M, scatter_M=scatter_M, scale_M=scale_M, top_k=top_k,
            swiglu=swiglu, keep_pre=keep_pre, tf32=tf32,
        )  # fmt: skip
        ctx.save_for_backward(x_RK, w_EKN, scale_M, ends_E, gather_M, scatter_M, pre)
        ctx.top_k, ctx.tf32 = top_k, tf32
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, w_EKN, scale_M, ends_E, gather_M, scatter_M, pre = ctx.saved_tensors
        needs_x, needs_w, needs_scale = ctx.needs_input_grad[:3]
        if pre is not None:
            dy, _, _ = swiglu_backward(pre, dy.contiguous())
        dx = dw = dscale = None
        if needs_x or needs_scale:
            # without the scale: <x @ w, dy> = <x, dy @ w^T> is then the gradient of the scale
            dx_MK, _ = gemm(dy, w_EKN.mT, ends_E, gather_M=scatter_M, scatter_M=gather_M, tf32=ctx.tf32)
            if scale_M is not None:
                slot_of_dx_M = _compose(scatter_M, gather_M, dx_MK.shape[0], dx_MK.device)
                if needs_scale:
                    x_MK = x_RK if ctx.top_k == 1 else x_RK.repeat_interleave(ctx.top_k, dim=0)
                    dots_M = torch.linalg.vecdot(x_MK.to(wide(x_MK)), dx_MK.to(wide(dx_MK)))
                    dscale = torch.empty_like(scale_M).index_copy_(0, slot_of_dx_M, dots_M.to(scale_M.dtype))
                dx_MK = dx_MK * scale_M.index_select(0, slot_of_dx_M)[:, None].to(dx_MK.dtype)
            dx = sum_slots(dx_MK, ctx.top_k) if needs_x else None
        if needs_w:
            dz = dy if scale_M is None else dy * scale_M[:, None].to(dy.dtype)
            dw = weight_grad(x_RK, dz, w_EKN, ends_E, gather_x_M=gather_M, gather_dy_M=scatter_M, top_k=ctx.top_k,
                             tf32=ctx.tf32)  # fmt: skip
        return dx, dw, dscale, None, None, None, None, None, None


def _compose(scatter_M: Tensor | None, gather_M: Tensor | None, M: int, device: torch.device) -> Tensor:
    """The row of y that row `gather[m]` of the slots of x went to, for each slot."""
    out_M = torch.arange(M, device=device) if scatter_M is None else scatter_M.long()
    return out_M if gather_M is None else torch.empty_like(out_M).index_copy_(0, gather_M.long(), out_M)


def sum_slots(y_MN: Tensor, top_k: int) -> Tensor:
    """Adds the `top_k` slots of each token, in fp32."""
    if top_k == 1:
        return y_MN
    return y_MN.view(-1, top_k, y_MN.shape[1]).sum(1, dtype=wide(y_MN)).to(y_MN.dtype)


def gemm(
    x_RK: Tensor,
    w_EKN: Tensor,
    ends_E: Tensor,
    *,
    gather_M: Tensor | None = None,
    scatter_M: Tensor | None = None,
    scale_M: Tensor | None = None,
    top_k: int = 1,
    swiglu: bool = False,
    keep_pre: bool = False,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`grouped_gemm` unchecked, without autograd: y and, with `keep_pre`, the [M, 2 I] input of the activation."""
    chip = chip_of(x_RK)
    if chip is not None:
        return _launch_gemm(
            chip, x_RK, w_EKN, ends_E, gather_M, scatter_M, scale_M, top_k, swiglu, keep_pre, tf32
        )  # fmt: skip
    rows_MK = x_RK if gather_M is None else x_RK.index_select(0, gather_M // top_k)
    pre_MN = _multiply_cpu(rows_MK, w_EKN, ends_E)
    y = pre_MN
    if swiglu:
        gate, up = pre_MN.chunk(2, dim=1)
        y = F.silu(gate).mul_(up)
    if scatter_M is not None:
        y = torch.empty_like(y).index_copy_(0, scatter_M.long(), y)
    if scale_M is not None:
        y = y.mul_(scale_M[:, None])
    return y, pre_MN if keep_pre else None


def _multiply_cpu(x_MK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    (M, K), (E, _, N) = x_MK.shape, w_EKN.shape
    path = tiles.cpu_path(M, E, K, N, x_MK.dtype, fp16_native=fp16_native())
    if path == "grouped_mm":
        dense = w_EKN.is_contiguous() or w_EKN.mT.is_contiguous()
        return F.grouped_mm(x_MK.contiguous(), w_EKN if dense else w_EKN.contiguous(), offs=ends_E)
    y_MN = x_MK.new_empty(M, N)
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            if path == "upcast":
                y_MN[begin:end] = x_MK[begin:end].float() @ w_EKN[expert].float()
            else:
                torch.mm(x_MK[begin:end], w_EKN[expert], out=y_MN[begin:end])
        begin = end
    return y_MN


def weight_grad(
    x_RK: Tensor,
    dy_MN: Tensor,
    like_EKN: Tensor,
    ends_E: Tensor,
    *,
    gather_x_M: Tensor | None = None,
    gather_dy_M: Tensor | None = None,
    top_k: int = 1,
    tf32: bool = False,
) -> Tensor:
    """`dw[e] = sum over e's rows m of x[in(m)]^T dy[out(m)]`, in the layout of the weight `like_EKN`."""
    transposed = like_EKN.mT.is_contiguous() and not like_EKN.is_contiguous()
    E, K, N = like_EKN.shape
    chip = chip_of(x_RK)
    if chip is not None:
        dw = x_RK.new_empty(E, N, K).mT if transposed else x_RK.new_empty(E, K, N)
        _launch_weight_grad(chip, x_RK, dy_MN, dw, ends_E, gather_x_M, gather_dy_M, top_k, tf32)
        return dw
    x_MK = x_RK if gather_x_M is None else x_RK.index_select(0, gather_x_M // top_k)
    dy_MN = dy_MN if gather_dy_M is None else dy_MN.index_select(0, gather_dy_M)
    if transposed:  # the same sum with its sides exchanged: written as the parameter is stored
        return _outer_cpu(dy_MN, x_MK, ends_E).mT
    return _outer_cpu(x_MK, dy_MN, ends_E)


def _outer_cpu(a_MK: Tensor, b_MN: Tensor, ends_E: Tensor) -> Tensor:
    (M, K), N, E = a_MK.shape, b_MN.shape[1], ends_E.shape[0]
    path = tiles.cpu_path(M, E, K, N, a_MK.dtype, fp16_native=fp16_native())
    if path == "grouped_mm":
        return F.grouped_mm(a_MK.contiguous().t(), b_MN.contiguous(), offs=ends_E)
    out_EKN = a_MK.new_empty(E, K, N)
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        a, b = a_MK[begin:end].t(), b_MN[begin:end]
        if path == "upcast":
            out_EKN[expert] = a.float() @ b.float()
        else:
            torch.mm(a, b, out=out_EKN[expert])
        begin = end
    return out_EKN


def swiglu_backward(
    pre_MI2: Tensor, dh_MI: Tensor, scale_M: Tensor | None = None, scatter_M: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient through `h = silu(gate) * up`, h recomputed from `pre = [gate, up]`: (dpre, s * h, dscale).

    Without `scale_M` the last two are None. With it, `dh_MI` is the gradient without the row's scale s, and `dscale` is
    `<h, dh>`, both found at `scatter_M[m]`.
    """
    if chip_of(pre_MI2) is not None:
        return _launch_swiglu_backward(pre_MI2, dh_MI, scale_M, scatter_M)
    if scale_M is None:
        dpre, _, _ = swiglu_backward_rows(pre_MI2, dh_MI, None)
        return dpre, None, None
    assert scatter_M is not None
    dpre, h, dots_M = swiglu_backward_rows(pre_MI2, dh_MI, scale_M.index_select(0, scatter_M)[:, None])
    return dpre, h, torch.empty_like(scale_M).index_copy_(0, scatter_M.long(), dots_M.to(scale_M.dtype))


def swiglu_backward_rows(pre_MI2: Tensor, dh_MI: Tensor, scale_M1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU path of `swiglu_backward`, its scale already in the order of the rows: (dpre, s * h, <h, dh>)."""
    gate, up = pre_MI2.chunk(2, dim=1)
    silu = F.silu(gate)
    h = silu * up
    dots_M = (h * dh_MI).sum(1, dtype=wide(h))
    if scale_M1 is not None:
        h *= scale_M1
        dh_MI = dh_MI * scale_M1
    dpre = torch.empty_like(pre_MI2)
    dgate, dup = dpre.chunk(2, dim=1)
    torch.mul(dh_MI, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(dh_MI * up, gate, grad_input=dgate)
    return dpre, h, dots_M


def fp16_native() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _launch_gemm(
    chip: Chip,
    x_RK: Tensor,
    w_EKN: Tensor,
    ends_E: Tensor,
    gather_M: Tensor | None,
    scatter_M: Tensor | None,
    scale_M: Tensor | None,
    top_k: int,
    swiglu: bool,
    keep_pre: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    from ale.kernels.grouped_gemm import kernel

    E, K, columns = w_EKN.shape
    M = x_RK.shape[0] * top_k
    N = columns // 2 if swiglu else columns
    y_MN = x_RK.new_empty(M, N)
    pre = x_RK.new_empty(M, columns) if keep_pre else None
    if y_MN.numel() == 0:
        return y_MN, pre
    k_major = w_EKN.stride(1) == 1 and w_EKN.stride(2) != 1
    aligned = is_aligned(x_RK) and is_aligned(w_EKN.mT if k_major else w_EKN)
    tile = tiles.gemm_tile(M, E, N, x_RK.dtype, chip.capability, aligned=aligned, swiglu=swiglu, tf32=tf32)
    x, x_tma = _operand(chip, x_RK, (tile.m, tile.k), wanted=gather_M is None)
    w, w_tma = _operand(
        chip,
        w_EKN.mT if k_major else w_EKN,
        (1, tile.n, tile.k) if k_major else (1, tile.k, tile.n),
        wanted=k_major or not swiglu or N * w_EKN.itemsize % TMA_ALIGNMENT == 0,  # the up half starts at N
    )
    most_tiles = (-(-M // tile.m) + E) * -(-N // tile.n)
    programs = min(chip.processors, most_tiles)
    with on_device_of(x_RK):
        kernel.grouped_gemm_kernel[(programs,)](
            x, w, y_MN, pre if keep_pre else y_MN, ends_E,
            ends_E if gather_M is None else gather_M,
            ends_E if scatter_M is None else scatter_M,
            y_MN if scale_M is None else scale_M.contiguous(),
            E, K, N, *x_RK.stride(), *w_EKN.stride(),
            TOP_K=top_k, GATHER=gather_M is not None, SCATTER=scatter_M is not None, SCALE=scale_M is not None,
            SWIGLU=swiglu, STORE_PRE=keep_pre, X_TMA=x_tma, W_TMA=w_tma, W_K_MAJOR=k_major,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=tile.group, LANES_E=_lanes(E),
            PRECISION="tf32" if tf32 else "ieee", UPCAST=multiplies_in_fp32(x_RK.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y_MN, pre


def _launch_weight_grad(
    chip: Chip,
    x_RK: Tensor,
    dy_MN: Tensor,
    dw_EKN: Tensor,
    ends_E: Tensor,
    gather_x_M: Tensor | None,
    gather_dy_M: Tensor | None,
    top_k: int,
    tf32: bool,
) -> None:
    from ale.kernels.grouped_gemm import kernel

    if dw_EKN.numel() == 0:
        return
    E, K, N = dw_EKN.shape
    aligned = is_aligned(x_RK) and is_aligned(dy_MN)
    tile = tiles.weight_grad_tile(K, N, x_RK.dtype, chip.capability, aligned=aligned, tf32=tf32)
    x, x_tma = _operand(chip, x_RK, (tile.m, tile.k), wanted=gather_x_M is None)
    dy, dy_tma = _operand(chip, dy_MN, (tile.m, tile.n), wanted=gather_dy_M is None)
    programs = min(chip.processors, E * -(-K // tile.k) * -(-N // tile.n))
    with on_device_of(x_RK):
        kernel.grouped_weight_grad_kernel[(programs,)](
            x, dy, dw_EKN, ends_E,
            ends_E if gather_x_M is None else gather_x_M,
            ends_E if gather_dy_M is None else gather_dy_M,
            E, K, N, *x_RK.stride(), *dy_MN.stride(), *dw_EKN.stride(),
            TOP_K=top_k, GATHER_X=gather_x_M is not None, GATHER_DY=gather_dy_M is not None, X_TMA=x_tma, DY_TMA=dy_tma,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_K=tile.group, LANES_E=_lanes(E),
            PRECISION="tf32" if tf32 else "ieee", UPCAST=multiplies_in_fp32(x_RK.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _launch_swiglu_backward(
    pre_MI2: Tensor, dh_MI: Tensor, scale_M: Tensor | None, scatter_M: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from ale.kernels.grouped_gemm import kernel

    (M, N), scaled = dh_MI.shape, scale_M is not None
    dpre = torch.empty_like(pre_MI2)
    h = torch.empty_like(dh_MI) if scaled else None
    dscale = torch.empty_like(scale_M) if scale_M is not None else None
    if M == 0:
        return dpre, h, dscale
    with on_device_of(pre_MI2):
        kernel.swiglu_backward_kernel[(-(-M // tiles.SWIGLU_ROWS),)](
            pre_MI2, dh_MI, dpre, h if scaled else dpre, scale_M if scaled else dpre,
            scatter_M if scaled else dpre, dscale if scaled else dpre, M, N,
            SCALE=scaled, BLOCK_M=tiles.SWIGLU_ROWS, BLOCK_N=tiles.SWIGLU_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dpre, h, dscale


def _operand(chip: Chip, tensor: Tensor, block: tuple[int, ...], *, wanted: bool) -> tuple[Any, bool]:
    """The tensor as the kernel takes it: a TMA descriptor of `block` where the layout allows one, else its pointer."""
    if wanted and takes_tma(tensor, chip):
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(tensor, list(block)), True
    return tensor, False


def _lanes(E: int) -> int:
    return 1 << (E - 1).bit_length()


def _check(
    x: Tensor,
    w: Tensor,
    ends: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    scale: Tensor | None,
    top_k: int,
    swiglu: bool,
) -> None:
    """Raises ValueError naming what does not fit, before anything is computed."""
    if x.dim() != 2 or w.dim() != 3 or w.shape[1] != x.shape[1]:
        raise ValueError(f"expected x [R, K] and w [E, K, N], got {tuple(x.shape)} and {tuple(w.shape)}")
    if ends.shape != (w.shape[0],) or ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expected ends of shape ({w.shape[0]},), int32 or int64, got {tuple(ends.shape)} {ends.dtype}"
        )
    allowed = _KERNEL_DTYPES if chip_of(x) is not None else (*_KERNEL_DTYPES, torch.float64)
    if x.dtype not in allowed or w.dtype != x.dtype:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"expected x and w of one dtype among {names}, got {x.dtype} and {w.dtype}")
    for name, tensor in (("w", w), ("ends", ends), ("gather", gather), ("scatter", scatter), ("scale", scale)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"expected {name} on {x.device} with x, got {tensor.device}")
    if top_k < 1 or (top_k > 1 and gather is None):
        raise ValueError(f"expected top_k of 1, or more together with gather, got {top_k}, gather {gather}")
    M = x.shape[0] * top_k
    bounds = ends.tolist()
    if bounds != sorted(bounds) or bounds[:1] < [0] or bounds[-1:] != [M]:
        raise ValueError(f"expected ends that rise from 0 to the {M} rows (R * top_k), got {_shown(bounds)}")
    for name, index in (("gather", gather), ("scatter", scatter)):
        if index is None:
            continue
        if index.shape != (M,) or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"expected {name} of shape ({M},), int32 or int64, got {tuple(index.shape)} {index.dtype}")
        if not torch.equal(index.sort().values, torch.arange(M, device=index.device, dtype=index.dtype)):
            raise ValueError(f"expected {name} to be a permutation of 0 to {M - 1}")
    if scale is not None and (scale.shape != (M,) or not scale.is_floating_point()):
        raise ValueError(f"expected scale of shape ({M},), floating point, got {tuple(scale.shape)} {scale.dtype}")
    if swiglu and (w.shape[2] % 2 or scatter is not None or scale is not None):
        raise ValueError(
            f"swiglu takes an even N and neither scatter nor scale (they belong to the projection after it), "
            f"got N {w.shape[2]}, scatter {scatter is not None}, scale {scale is not None}"
        )


def _shown(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
