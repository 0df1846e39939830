"""Products with the model's weights: kept a second time in the blocked layout that oneDNN multiplies fastest.

A decoding step multiplies a few rows with every weight of the model. The general product first rearranges the weight,
which at 16 rows costs as much as the arithmetic; here that happens once for each version of the weights. With
`torch.bfloat16` the packed copy is half the size and the products run on bfloat16 instructions where the processor has
them; what a product takes and gives stays in the dtype of its input.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Below this the call costs more than it saves (measured at 16 rows: 128 x 128 loses 10 us, 576 x 192 breaks even).
_MIN_ELEMENTS = 128 * 1024

Linear: TypeAlias = nn.Linear | Conv1D
LINEAR = (nn.Linear, Conv1D)


def packs(elements: int) -> bool:
    """Whether a weight of this size gains by being packed. Never where torch comes without oneDNN."""
    return elements >= _MIN_ELEMENTS and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Product:
    """`x @ w.T + b` of one linear layer (`nn.Linear`, or the transposed `Conv1D` of GPT-2), or of several that read the
    same input, their outputs side by side. The layers keep their parameters; call `pack` after they have changed.
    """

    def __init__(self, layers: list[Linear], dtype: torch.dtype, *, after: Literal["none", "swish"] = "none") -> None:
        self.layers = layers
        self._dtype = dtype
        self._after = after
        self.packed = packs(sum(layer.weight.numel() for layer in layers))
        self.pack()

    @property
    def products(self) -> tuple[Product, ...]:
        return (self,)

    @property
    def inputs(self) -> int:
        layer = self.layers[0]
        return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)

    @torch.no_grad()
    def pack(self) -> None:
        weights = [x.weight.T if isinstance(x, Conv1D) else x.weight for x in self.layers]
        biases = [x.bias for x in self.layers if x.bias is not None]
        weight_NK = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        self._bias = None if not biases else torch.cat([b.detach() for b in biases])
        if self.packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.to(self._dtype).contiguous())
            self._bias = None if self._bias is None else self._bias.to(self._dtype)
        else:
            self._weight = weight_NK

    def __call__(self, input: Tensor, times: Tensor | None = None) -> Tensor:
        """With `times`, the product is multiplied by it, element by element."""
        if not self.packed:
            product = F.linear(input, self._weight, self._bias)
            product = F.silu(product) if self._after == "swish" else product
            return product if times is None else product * times
        x, op = input.to(self._dtype), torch.ops.mkldnn._linear_pointwise
        if times is None:
            product = op(x, self._weight, self._bias, self._after, [], "")
        else:
            product = op.binary(x, times.to(self._dtype), self._weight, self._bias, "mul")
        result: Tensor = product.to(input.dtype)
        return result
