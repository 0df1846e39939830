"""What a model is made of, in numbers: read off a model that has no weights."""

from __future__ import annotations

import msgspec
from transformers import PreTrainedConfig

from ale.models.load import model_without_weights


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """`ModelShape(kind="qwen3_moe", parameters=30_532_122_624, layers=48, width=2048, ...)`. Counts are of numbers, not
    bytes."""

    kind: str
    parameters: int
    """Tied ones once."""
    embeddings: int
    """Of the tables that are looked up in, tied or not: no product goes through them."""
    outside: int
    """Embedding, last norm and head: what is not in a decoder layer."""
    layer: int
    """Of the largest decoder layer."""
    expert_parameters: int
    """Of all experts of all layers."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    intermediate: int
    """Of the dense feed-forward block, or of one expert."""
    experts: int = 0
    chosen: int = 0

    @property
    def active(self) -> int:
        """Parameters that a token is computed with: all but the experts that are not chosen."""
        if not self.experts:
            return self.parameters
        return self.parameters - self.expert_parameters * (self.experts - self.chosen) // self.experts

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with in a forward: the active ones without the table it is looked up
        in. A tied table is the head, and counts."""
        tied = self.embeddings and self.outside < 2 * self.embeddings
        return self.active - (0 if tied else self.embeddings)


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Builds the model without memory and counts."""
    model = model_without_weights(config)
    named = dict(model.named_parameters())
    layers: dict[str, int] = {}
    experts = 0
    for name, parameter in named.items():
        place = next((i for i, part in enumerate(name.split(".")) if part.isdigit()), None)
        if place is not None:
            key = ".".join(name.split(".")[: place + 1])
            layers[key] = layers.get(key, 0) + parameter.numel()
        if ".experts." in name:
            experts += parameter.numel()
    total = sum(parameter.numel() for parameter in named.values())
    count = int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)
    heads = int(config.num_attention_heads)
    intermediate = getattr(config, "moe_intermediate_size", None) if count else None
    return ModelShape(
        kind=config.model_type,
        parameters=total,
        embeddings=model.get_input_embeddings().weight.numel(),
        outside=total - sum(layers.values()),
        layer=max(layers.values(), default=0),
        expert_parameters=experts,
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=int(config.vocab_size),
        intermediate=int(
            intermediate
            or getattr(config, "intermediate_size", None)
            or getattr(config, "n_inner", None)
            or 4 * config.hidden_size
        ),
        experts=count,
        chosen=int(config.num_experts_per_tok) if count else 0,
    )
