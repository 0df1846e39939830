"""The experts of a small mixture while decoding: every expert for every token, in two packed products.

With a few dozen tokens a layer spends its time on sorting them by expert and on many small products. Computing all
experts costs E / J times the arithmetic and two calls; what was not chosen has weight 0. Above some number of tokens
the arithmetic is the larger part, and the layer's own forward is taken.

Axes: T tokens, D hidden, E experts, J of them chosen, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ale.kernels.moe import is_plain_swiglu

SPARE_FLOPS = 3e7
"""Operations on what was not chosen that cost as much as the calls they save (measured on one core with AVX-512)."""


def pays(T: int, J: int, E: int, D: int, I: int) -> bool:  # noqa: E741  the axes' names
    return 6 * T * (E - J) * D * I <= SPARE_FLOPS


class PackedExperts:
    """Takes the place of the `forward` of an experts module of transformers."""

    def __init__(self, module: Any) -> None:
        self._module, self._own = module, module.forward
        self.products = ()
        self.pack()

    @staticmethod
    def fits(module: Any) -> bool:
        """Worth two copies only where a handful of tokens gain: a layer of a few small experts."""
        if not hasattr(module, "_is_expert_parallel") or not is_plain_swiglu(module) or module.is_transposed:
            return False
        E, I2, D = module.gate_up_proj.shape
        return (
            torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and module.gate_up_proj.dtype is torch.float32
            and pays(16, 1, E, D, I2 // 2)
        )

    @torch.no_grad()
    def pack(self) -> None:
        gate_up_E2ID, down_EDI = self._module.gate_up_proj.detach(), self._module.down_proj.detach()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._gate_up = reorder(gate_up_E2ID.flatten(0, 1).contiguous())
        self._down = reorder(down_EDI.transpose(0, 1).flatten(1).contiguous())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        (T, J), (E, I2, D) = top_k_index.shape, self._module.gate_up_proj.shape
        parallel = self._module._is_expert_parallel
        if torch.is_grad_enabled() or parallel or hidden_states.dim() != 2 or not pays(T, J, E, D, I2 // 2):
            return self._own(hidden_states, top_k_index, top_k_weights)
        linear = torch.ops.mkldnn._linear_pointwise
        weight_TE = top_k_weights.new_zeros(T, E).scatter_(1, top_k_index, top_k_weights)
        pre_TE2I = linear(hidden_states, self._gate_up, None, "none", [], "").view(T, E, 2, -1)
        h_TEI = F.silu(pre_TE2I[:, :, 0]).mul_(pre_TE2I[:, :, 1]).mul_(weight_TE[:, :, None])
        return linear(h_TEI.flatten(1), self._down, None, "none", [], "")
