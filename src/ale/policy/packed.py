"""Linear layers for decoding: weights kept a second time in the blocked layout that oneDNN multiplies fastest.

A decoding step multiplies a few rows with every weight of the model. The general product first rearranges the weight,
which at 16 rows costs as much as the arithmetic; here that happens once for each version of the weights. With
`torch.bfloat16` the packed copy is half the size and the products run on bfloat16 instructions where the processor has
them; what the layer takes and gives stays in the dtype of its input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Below this the call costs more than it saves (measured at 16 rows: 128 x 128 loses 10 us, 576 x 192 breaks even).
_MIN_ELEMENTS = 128 * 1024


class PackedLinear:
    """Takes the place of the `forward` of a linear layer (`nn.Linear`, or the transposed `Conv1D` of GPT-2).

    The layer keeps its parameters; call `pack` after they have changed.
    """

    def __init__(self, layer: nn.Linear | Conv1D, dtype: torch.dtype) -> None:
        self._layer = layer
        self._dtype = dtype
        self.pack()

    @property
    def inputs(self) -> int:
        return int(self._layer.nx if isinstance(self._layer, Conv1D) else self._layer.in_features)

    @torch.no_grad()
    def pack(self) -> None:
        weight_NK = self._layer.weight.T if isinstance(self._layer, Conv1D) else self._layer.weight
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.to(self._dtype).contiguous())
        bias_N = self._layer.bias
        self._bias = None if bias_N is None else bias_N.detach().to(self._dtype)

    def __call__(self, input: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            input.to(self._dtype), self._weight, self._bias, "none", [], ""
        )
        return product.to(input.dtype)


def pack_linears(model: PreTrainedModel, dtype: torch.dtype) -> list[PackedLinear]:
    """Packs the large linear layers of `model` in place. None where torch comes without oneDNN.

    The head keeps the model's dtype: logits rounded to bfloat16 would be off by 0.06 where they are near 16.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    head = model.get_output_embeddings()
    packed = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer.weight.numel() >= _MIN_ELEMENTS:
            product = PackedLinear(layer, model.dtype if layer is head else dtype)
            layer.forward = product  # type: ignore[method-assign]
            packed.append(product)
    return packed
