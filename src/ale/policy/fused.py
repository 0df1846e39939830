"""Modules of the model with the same result in fewer, larger operations: beside its products, what a decoding step
costs is how many operations it has.

Nothing here knows an architecture by name. A module is a candidate by its parts, and its replacement is taken only if
it gives what the module gives, on random input. Replacements read the parameters anew at `pack`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from ale.models.load import hidden_states
from ale.policy.attention import FlatCache, FusedAttention
from ale.policy.experts import PackedExperts
from ale.policy.kv_cache import KVRows, RowsCache
from ale.policy.packed import LINEAR, Product, packs

_ROWS, _LENGTH = 3, 6  # of the random input
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_ANY_MASK = torch.zeros(1, 1, 1, 1)  # a mask of four axes is left alone; with FlatCache nothing looks at it


class FusedPart(Protocol):
    @property
    def products(self) -> tuple[Product, ...]: ...

    def pack(self) -> None:
        """Call after the parameters have changed."""


class Fused(NamedTuple):
    parts: list[FusedPart]
    flat: bool
    """Whether every attention layer takes a `FlatCache`, so that forwards need no padding."""

    def pack(self) -> None:
        for part in self.parts:
            part.pack()


class FusedSwiGLU:
    """`down(silu(gate(x)) * up(x))` with the activation and the factor inside of the packed products."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._own = module.forward
        self._gate = Product([module.gate_proj], dtype, after="swish")
        self._up = Product([module.up_proj], dtype)
        self._down = Product([module.down_proj], dtype)
        self.products = (self._gate, self._up, self._down)

    @staticmethod
    def fits(module: Any) -> bool:
        names, layers = {name for name, _ in module.named_children()}, ("gate_proj", "up_proj", "down_proj")
        return (
            set(layers) <= names <= {*layers, "act_fn"}
            and isinstance(getattr(module, "act_fn", None), SiLUActivation | nn.SiLU)
            and all(type(getattr(module, name)) is nn.Linear for name in layers)
            and packs(module.gate_proj.weight.numel())
        )

    def pack(self) -> None:
        for product in self.products:
            product.pack()

    def __call__(self, x: Tensor) -> Any:
        return self._own(x) if torch.is_grad_enabled() else self._down(self._up(x, times=self._gate(x)))


class FusedNorm:
    """`weight * x / rms(x)` in one call."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @staticmethod
    def fits(module: Any) -> bool:
        parameters = [name for name, _ in module.named_parameters()]
        return parameters == ["weight"] and hasattr(module, "variance_epsilon") and module.weight.dim() == 1

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._module.weight.shape, self._module.weight, self._module.variance_epsilon)


@torch.inference_mode()
def fuse(model: PreTrainedModel, dtype: torch.dtype) -> Fused:
    """Replaces what it can in place, and packs the other large linear layers; `dtype` is that of the products.

    The head keeps the model's dtype: logits rounded to bfloat16 would be off by 0.06 where they are near 16.
    """
    parts: list[FusedPart] = []
    attention = [FusedAttention(module, dtype) for module in model.modules() if FusedAttention.fits(module)]
    flat = len(attention) == model.config.num_hidden_layers and all(_same_attention(model, a, dtype) for a in attention)
    if flat:
        parts += attention
        for layer in attention:
            layer.module.forward = layer
    for module in model.modules():
        if FusedNorm.fits(module):
            norm = FusedNorm(module)
            x = _random(model, _ROWS, module.weight.numel())
            if _agree(module.forward(x), norm(x), model.dtype):
                module.forward = norm
        elif FusedSwiGLU.fits(module):
            swiglu = FusedSwiGLU(module, dtype)
            x = _random(model, _ROWS, 1, module.gate_proj.in_features)
            if _agree(module.forward(x), swiglu(x), dtype):
                module.forward = swiglu
                parts.append(swiglu)
        elif PackedExperts.fits(module):
            experts = PackedExperts(module)
            x = _random(model, _ROWS, module.gate_up_proj.shape[2])
            chosen = torch.arange(_ROWS)[:, None] % module.num_experts
            if _agree(module.forward(x, chosen, x[:, :1]), experts(x, chosen, x[:, :1]), model.dtype):
                module.forward = experts
                parts.append(experts)
    inside = {id(layer) for part in parts for product in part.products for layer in product.layers}
    for module in model.modules():
        if isinstance(module, LINEAR) and id(module) not in inside and packs(module.weight.numel()):
            product = Product([module], model.dtype if module is model.get_output_embeddings() else dtype)
            module.forward = product  # type: ignore[method-assign]
            parts.append(product)
    return Fused(parts, flat)


def flat_hidden_states(model: PreTrainedModel, ids_N: Tensor, cache: FlatCache) -> Tensor:
    """The last hidden states [N, D] of tokens that lie one after the other."""
    output = hidden_states(
        model,
        input_ids=ids_N[None],
        position_ids=cache.position_N[None],
        attention_mask=_ANY_MASK,
        use_cache=True,
        cache=cache,
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def _same_attention(model: PreTrainedModel, fused: FusedAttention, dtype: torch.dtype) -> bool:
    """Three rows: prompts alone, prompts that go on beside a single token, single tokens alone."""
    module, rotary = fused.module, getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return False
    x_BTD = _random(model, _ROWS, _LENGTH, module.q_proj.in_features)
    flat, padded = (KVRows(model.config, _ROWS, model.dtype) for _ in range(2))
    for begin_B, end_B in (((0, 0, 0), (2, 2, 1)), ((2, 2, 1), (5, 3, 4)), ((5, 3, 4), (6, 4, 5))):
        rows, count_B = list(range(_ROWS)), [e - b for b, e in zip(begin_B, end_B, strict=True)]
        cache = FlatCache(flat, rows, list(begin_B), count_B)
        flat_x = torch.cat([x_BTD[row, b:e] for row, b, e in zip(rows, begin_B, end_B, strict=True)])[None]
        cos, sin = rotary(flat_x, cache.position_N[None])
        if cos.shape[-1] != module.head_dim:
            return False
        named: dict[str, Any] = {"position_embeddings": (cos, sin), "attention_mask": None}
        ours = fused(flat_x, **named, cache=cache)[0][0].split(count_B)
        for row, begin, end in zip(rows, begin_B, end_B, strict=True):
            position_1Q = torch.arange(begin, end)[None]
            named = {
                "position_embeddings": rotary(x_BTD, position_1Q),
                "attention_mask": (torch.arange(end) <= position_1Q[:, :, None])[:, None],
                "cache": RowsCache(padded, [row], [begin], [end - begin]),
            }
            own = module.forward(x_BTD[row : row + 1, begin:end], **named)[0][0]
            if not _agree(own, ours[row], dtype):
                return False
    return True


def _agree(own: Tensor, ours: Tensor, dtype: torch.dtype) -> bool:
    return own.shape == ours.shape and bool((own - ours).abs().max() <= _TOLERANCE[dtype] * own.abs().max())


def _random(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=model.dtype)
