"""The CUDA path of `grouped_gemm`: picks a tile, makes descriptors, launches. Not yet run on a GPU.

Axes: R rows of x, M rows of the product (sorted by expert), E experts, K inputs, N outputs, I = N / 2 with SwiGLU.
"""

from typing import Any

import torch
from torch import Tensor

from ale.kernels.device import TMA_ALIGNMENT, Chip, is_aligned, multiplies_in_fp32, on_device_of, takes_tma
from ale.kernels.grouped_gemm import kernel, tiles
from ale.kernels.grouped_gemm.cpu import Variant


def gemm(
    chip: Chip, x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor, variant: Variant, *, keep_pre: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y and, with `keep_pre`, the [M, 2 I] input of the activation."""
    gather_M, scatter_M, scale_M, top_k, swiglu, tf32 = variant
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


def weight_grad(
    chip: Chip,
    x_RK: Tensor,
    dy_MN: Tensor,
    ends_E: Tensor,
    gather_x_M: Tensor | None,
    gather_dy_M: Tensor | None,
    top_k: int,
    *,
    transposed: bool,
    tf32: bool,
) -> Tensor:
    """dw [E, K, N], stored [E, N, K] where `transposed`."""
    E, K, N = ends_E.shape[0], x_RK.shape[1], dy_MN.shape[1]
    dw_EKN = x_RK.new_empty(E, N, K).mT if transposed else x_RK.new_empty(E, K, N)
    if dw_EKN.numel() == 0:
        return dw_EKN
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
    return dw_EKN


def swiglu_backward(
    pre_MI2: Tensor, dh_MI: Tensor, scale_M: Tensor | None, scatter_M: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dpre, s * h, dscale at `scatter[m]`); the last two None without a scale."""
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
