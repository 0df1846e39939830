"""The training forward: log-probabilities of the tokens that were sampled, and the router's balancing loss."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ale.kernels import linear_logprob
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
    logp_A = _head_logp(model.get_output_embeddings(), before_AD, batch.action_ids_A, temperature)
    if not router_loss:
        return logp_A, None
    return logp_A, _router_loss(output.router_logits, model.config.num_experts_per_tok, batch.real_BT)


def _head_logp(head: torch.nn.Module, before_AD: Tensor, ids_A: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of `ids_A` after the hidden states before them.

    A plain linear head, tied or not, goes through `linear_logprob`, which never holds [A, V] logits. It pays at every
    vocabulary: with 768 words the two passes of an update (pi_old, then training) take as long as with logits, from a
    few thousand on the logits and their gradient are most of the memory of an update.
    """
    if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None:
        return linear_logprob(before_AD, head.weight, ids_A, temperature=temperature)
    logits_AV = head(before_AD).float() / temperature
    return torch.log_softmax(logits_AV, -1).gather(1, ids_A[:, None])[:, 0]


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
    """Whether the model routes tokens by softmax and top-k, and can show its router logits."""
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def _router_loss(router_logits: Sequence[Tensor], chosen: int, real_BT: Tensor) -> Tensor:
    """Load balancing (arXiv 2101.03961, eq. 4 to 6) within each sequence and layer (arXiv 2412.19437, eq. 17 to 20):
    E sum_e f_e P_e, averaged over layers and tokens; `chosen` where the load is even. Router logits are [B*T, E].

    Over a micro-batch the product of the two means would depend on how the batch was split; a sequence is never split.
    """
    real_BT1 = real_BT[..., None].float()
    tokens_B = real_BT1.sum((1, 2))
    loss_B = torch.zeros_like(tokens_B)
    for logits in router_logits:
        share_BTE = logits.float().softmax(-1).view(*real_BT.shape, -1)
        picked_BTE = torch.zeros_like(share_BTE).scatter_(-1, share_BTE.topk(chosen, -1).indices, 1.0)
        f_BE = (picked_BTE * real_BT1).sum(1) / tokens_B[:, None]
        P_BE = (share_BTE * real_BT1).sum(1) / tokens_B[:, None]
        loss_B = loss_B + share_BTE.shape[-1] * (f_BE * P_BE).sum(-1)
    return (loss_B * tokens_B).sum() / (tokens_B.sum() * len(router_logits))
