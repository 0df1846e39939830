"""The training forward: log-probabilities of the tokens that were sampled, and the router's balancing loss."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ale.learner.batch import MicroBatch
from ale.models.load import hidden_states


def action_logp(
    model: PreTrainedModel, batch: MicroBatch, temperature: float, *, router_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities float32 [A] of the action tokens at `temperature`, and the router loss (a mean over tokens).

    The head is applied to the positions before action tokens only.
    """
    output = hidden_states(
        model,
        input_ids=batch.ids_BT,
        attention_mask=batch.real_BT.long(),
        use_cache=False,
        **({"output_router_logits": True} if router_loss else {}),
    )
    before_AD = output.last_hidden_state[batch.action_row_A, batch.action_position_A - 1]
    logits_AV = model.get_output_embeddings()(before_AD).float() / temperature
    logp_A = torch.log_softmax(logits_AV, -1).gather(1, batch.action_ids_A[:, None])[:, 0]
    return logp_A, _router_loss(model, output, batch) if router_loss else None


class _WithWeights(torch.nn.Module):
    """Lets `functional_call` run `action_logp`, whose head is reached outside of the model's own forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, temperature: float) -> Tensor:
        return action_logp(self.model, batch, temperature)[0]


@torch.no_grad()
def action_logp_under(
    model: PreTrainedModel, weights: Mapping[str, Tensor], batch: MicroBatch, temperature: float
) -> Tensor:
    """The same log-probabilities under other weights of the model (those of the version that sampled), no gradient."""
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    result: Tensor = functional_call(_WithWeights(model), named, (batch, temperature), strict=False)
    return result


def is_moe(model: PreTrainedModel) -> bool:
    return getattr(model.config, "num_experts", None) is not None and _balancing_loss(model) is not None


def _balancing_loss(model: PreTrainedModel) -> object:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


def _router_loss(model: PreTrainedModel, output: object, batch: MicroBatch) -> Tensor:
    balancing = _balancing_loss(model)
    assert callable(balancing)
    loss: Tensor = balancing(
        output.router_logits,  # type: ignore[attr-defined]
        model.config.num_experts,
        model.config.num_experts_per_tok,
        batch.real_BT.long(),
    )
    return loss
