"""Choosing the next token: temperature, top-p and top-k, with one random stream for each sequence.

A token depends on its sequence's logits, seed and position alone, never on what else was in the batch: the uniform
number comes from a counter-based generator and the draw inverts the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ale.messages import Sampling


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of this seed and position (splitmix64)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def sample(
    logits_BV: Tensor, settings: Sequence[Sampling], uniform_B: npt.NDArray[np.float64]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token for each row.

    Returns tokens int64 [B], their log-probabilities under the untruncated distribution at the row's temperature
    (1 where that is 0) float32 [B], and those under the distribution really drawn from float32 [B] (0 where the
    temperature is 0: greedy has no choice).
    """
    logits_BV = logits_BV.float()
    temperature_B = torch.tensor([s.temperature or 1.0 for s in settings])
    logp_BV = torch.log_softmax(logits_BV / temperature_B[:, None], dim=-1)
    greedy_B = temperature_B.new_tensor([s.temperature == 0 for s in settings], dtype=torch.bool)
    kept_BV = _truncate(logp_BV, settings)
    # In float64 the cumulative sum reaches 1 to within 1e-13: no token is favoured by rounding.
    cumulative_BV = kept_BV.double().exp().cumsum(-1)
    threshold_B1 = torch.from_numpy(uniform_B)[:, None] * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    token_B = token_B.clamp_(max=logits_BV.shape[-1] - 1)
    token_B = torch.where(greedy_B, logits_BV.argmax(-1), token_B)
    pick = token_B[:, None]
    logp_B = logp_BV.gather(1, pick)[:, 0]
    sampled_B = logp_B
    if kept_BV is not logp_BV:
        sampled_B = (kept_BV.gather(1, pick) - torch.logsumexp(kept_BV, -1, keepdim=True))[:, 0]
    return token_B, logp_B, sampled_B.masked_fill(greedy_B, 0.0)


def _truncate(logp_BV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Sets what top-k and top-p exclude to -inf; the same tensor when no row truncates."""
    if all(s.top_p >= 1.0 and not s.top_k for s in settings):
        return logp_BV
    size = logp_BV.shape[-1]
    sorted_BV, order_BV = logp_BV.sort(-1, descending=True)
    rank_V = torch.arange(size)
    top_k_B1 = torch.tensor([[s.top_k or size] for s in settings])
    top_p_B1 = torch.tensor([[s.top_p] for s in settings])
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    drop_BV = (rank_V[None, :] >= top_k_B1) | ((before_BV >= top_p_B1) & (top_p_B1 < 1.0))
    drop_BV[:, 0] = False
    return logp_BV.masked_fill(torch.zeros_like(drop_BV).scatter_(1, order_BV, drop_BV), float("-inf"))
