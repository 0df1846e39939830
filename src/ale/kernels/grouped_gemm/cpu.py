"""The CPU path of `grouped_gemm`: torch's products, whichever is the faster for the shape.

Axes: R rows of x, M rows of the product (sorted by expert), E experts, K inputs, N outputs, I = N / 2 with SwiGLU.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ale.kernels.device import wide
from ale.kernels.grouped_gemm import tiles


class Variant(NamedTuple):
    """What a call does beside the product: the options of `grouped_gemm`."""

    gather_M: Tensor | None = None
    scatter_M: Tensor | None = None
    scale_M: Tensor | None = None
    top_k: int = 1
    swiglu: bool = False
    tf32: bool = False

    @property
    def is_plain(self) -> bool:
        """Nothing but the product."""
        return self.gather_M is None and self.scatter_M is None and self.scale_M is None and not self.swiglu


PLAIN = Variant()


@cache
def processor() -> tiles.Processor:
    return tiles.Processor(
        amx=bool(torch.cpu.get_capabilities().get("amx_tile")),
        fp16=bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )


def path_of(x_MK: Tensor, w_EKN: Tensor) -> tiles.CpuPath:
    E, K, N = w_EKN.shape
    return tiles.cpu_path(x_MK.shape[0], E, K, N, x_MK.dtype, processor())


def gemm(
    x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor, variant: Variant, *, keep_pre: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y and, with `keep_pre`, the [M, 2 I] input of the activation."""
    gather_M, scatter_M, scale_M, top_k, swiglu, _ = variant
    pre_MN = multiply(x_RK if gather_M is None else x_RK.index_select(0, gather_M // top_k), w_EKN, ends_E)
    y = pre_MN
    if swiglu:
        gate, up = pre_MN.chunk(2, dim=1)
        y = F.silu(gate).mul_(up)
    if scatter_M is not None:
        y = torch.empty_like(y).index_copy_(0, scatter_M.long(), y)
    if scale_M is not None:
        y = y.mul_(scale_M[:, None])
    return y, pre_MN if keep_pre else None


def multiply(x_MK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """`y[m] = x[m] @ w[e(m)]`. Differentiable where the path is "grouped_mm", and there only."""
    path = path_of(x_MK, w_EKN)
    if path == "grouped_mm":
        dense = w_EKN.is_contiguous() or w_EKN.mT.is_contiguous()
        return F.grouped_mm(x_MK.contiguous(), w_EKN if dense else w_EKN.contiguous(), offs=ends_E)
    y_MN = x_MK.new_empty(x_MK.shape[0], w_EKN.shape[2])
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
    ends_E: Tensor,
    gather_x_M: Tensor | None,
    gather_dy_M: Tensor | None,
    top_k: int,
    *,
    transposed: bool,
) -> Tensor:
    """dw [E, K, N], stored [E, N, K] where `transposed`."""
    x_MK = x_RK if gather_x_M is None else x_RK.index_select(0, gather_x_M // top_k)
    dy_MN = dy_MN if gather_dy_M is None else dy_MN.index_select(0, gather_dy_M)
    if transposed:  # the same sum with its sides exchanged: written as the parameter is stored
        return _outer(dy_MN, x_MK, ends_E).mT
    return _outer(x_MK, dy_MN, ends_E)


def _outer(a_MK: Tensor, b_MN: Tensor, ends_E: Tensor) -> Tensor:
    (M, K), N, E = a_MK.shape, b_MN.shape[1], ends_E.shape[0]
    path = tiles.cpu_path(M, E, K, N, a_MK.dtype, processor())
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


def swiglu_backward(pre_MI2: Tensor, dh_MI: Tensor, scale_M1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dpre, s * h, <h, dh>) with the scale s in the order of the rows."""
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
