"""The torch twin of `grouped_gemm`: same signature, one product per expert, nothing clever.

Axes: M rows sorted by expert, E experts, K inputs, N outputs, I = N / 2 with SwiGLU.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_gemm_reference(
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
    """`y[out(m)] = scale[out(m)] * act(x[in(m)] @ w[e(m)])` in fp32 (fp64 stays fp64), autograd by torch.

    `in(m) = gather[m] // top_k`, `out(m) = scatter[m]`; both are `m` when their argument is None. `tf32` has no
    meaning here: the twin is always exact.
    """
    wide = torch.float64 if x_RK.dtype is torch.float64 else torch.float32
    rows_MK = (x_RK if gather_M is None else x_RK[gather_M // top_k]).to(wide)
    begin, products = 0, []
    for expert, end in enumerate(ends_E.tolist()):
        z = rows_MK[begin:end] @ w_EKN[expert].to(wide)
        if swiglu:
            gate, up = z.chunk(2, dim=-1)
            z = F.silu(gate) * up
        products.append(z)
        begin = end
    y_MN = torch.cat(products)
    if scatter_M is not None:
        y_MN = y_MN[torch.argsort(scatter_M)]
    if scale_M is not None:
        y_MN = y_MN * scale_M.to(wide)[:, None]
    return y_MN.to(x_RK.dtype)
