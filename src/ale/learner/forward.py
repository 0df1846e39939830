"""The training forward: log-probabilities of the tokens that were sampled, and the router's balancing loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ale.kernels import linear_logprob
from ale.kernels.routing_replay import replay_routing
from ale.learner.batch import MicroBatch
from ale.models.load import hidden_states


def action_logp(
    model: PreTrainedModel,
    batch: MicroBatch,
    temperature: float,
    *,
    precision: torch.dtype = torch.float32,
    router_loss: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities float32 [A] of the action tokens at `temperature`, and the router loss (a mean over tokens).

    The head is applied to the positions before action tokens only. `precision` is that of the products in the body;
    logits are never rounded to less than the weights have. Where the batch carries the experts that were chosen while
    sampling, they are used again (`ale.kernels.routing_replay`).
    """
    with routed(model, batch):
        return _action_logp(model, batch, temperature, precision, router_loss)


def routed(model: PreTrainedModel, batch: MicroBatch) -> AbstractContextManager[None]:
    """Inside, tokens go through the experts that the batch recorded. Where layers are computed again in the backward,
    that has to lie inside too."""
    return nullcontext() if batch.experts_LBTJ is None else replay_routing(model, batch.experts_LBTJ)


def _action_logp(
    model: PreTrainedModel, batch: MicroBatch, temperature: float, precision: torch.dtype, router_loss: bool
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(batch.ids_BT.device.type, precision, enabled=precision is not torch.float32):
        output = hidden_states(
            model,
            input_ids=batch.ids_BT,
            use_cache=False,
            **_attention(batch, model.dtype),
            **({"output_router_logits": True} if router_loss else {}),
        )
    before_AD = output.last_hidden_state.flatten(0, 1)[batch.before_A]
    logp_A = _head_logp(model.get_output_embeddings(), before_AD, batch.action_ids_A, temperature)
    if not router_loss:
        return logp_A, None
    return logp_A, _router_loss(output.router_logits, model.config.num_experts_per_tok, batch.places_N)


def _attention(batch: MicroBatch, dtype: torch.dtype) -> dict[str, Any]:
    if batch.sees_BTT is None:
        return {}
    # Additive, once for all layers: given as bool, each layer would turn it into numbers and keep its own for backward.
    mask_BTT = torch.zeros(batch.sees_BTT.shape, dtype=dtype, device=batch.sees_BTT.device)
    mask_BTT.masked_fill_(~batch.sees_BTT, -torch.inf)
    return {"position_ids": batch.position_BT, "attention_mask": mask_BTT[:, None]}


def _head_logp(head: torch.nn.Module, before_AD: Tensor, ids_A: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of `ids_A` after the hidden states before them.

    A plain linear head, tied or not, goes through `linear_logprob`, which never holds [A, V] logits. It pays at every
    vocabulary: with 768 words the two passes of an update (pi_old, then training) take as long as with logits, from a
    few thousand on the logits and their gradient are most of the memory of an update.
    """
    if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None:
        return linear_logprob(before_AD.to(head.weight.dtype), head.weight, ids_A, temperature=temperature)
    logits_AV = head(before_AD).float() / temperature
    return torch.log_softmax(logits_AV, -1).gather(1, ids_A[:, None])[:, 0]


class PolicyModel(torch.nn.Module):
    """The model with its head as one module: what is sharded, and what an update calls."""

    def __init__(self, model: PreTrainedModel, precision: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, batch: MicroBatch, temperature: float, router_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """As `action_logp`; the caller holds `routed` open, until after the backward."""
        return _action_logp(self.model, batch, temperature, self.precision, router_loss)


def is_moe(model: PreTrainedModel) -> bool:
    """Whether the model routes tokens by softmax and top-k, and can show its router logits."""
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def _router_loss(router_logits: Sequence[Tensor], chosen: int, places_N: Sequence[Tensor]) -> Tensor:
    """Load balancing (arXiv 2101.03961, eq. 4 to 6) within each sequence and layer (arXiv 2412.19437, eq. 17 to 20):
    E sum_e f_e P_e, averaged over layers and tokens; `chosen` where the load is even. Router logits are [B*T, E].

    Over a micro-batch the product of the two means would depend on how the batch was split; a sequence is never split.
    """
    device = router_logits[0].device
    tokens_N = torch.tensor([len(places) for places in places_N], dtype=torch.float32, device=device)
    places_NT = pad_sequence(list(places_N), batch_first=True)
    real_NT1 = (torch.arange(places_NT.shape[1], device=device) < tokens_N[:, None]).float()[..., None]
    loss_N = torch.zeros_like(tokens_N)
    for logits in router_logits:
        share_NTE = logits.float().softmax(-1)[places_NT]
        picked_NTE = torch.zeros_like(share_NTE).scatter_(-1, share_NTE.topk(chosen, -1).indices, 1.0)
        f_NE = (picked_NTE * real_NT1).sum(1) / tokens_N[:, None]
        P_NE = (share_NTE * real_NT1).sum(1) / tokens_N[:, None]
        loss_N = loss_N + share_NTE.shape[-1] * (f_NE * P_NE).sum(-1)
    return (loss_N * tokens_N).sum() / (tokens_N.sum() * len(router_logits))
