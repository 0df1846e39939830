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

_BLOCK = 1024  # tokens of the vocabulary that are looked at one by one


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
    # Every pass over [B, V] shows in the time of a decoding step, so there are as few as can be.
    logits_BV = logits_BV.float()
    temperature_B = torch.tensor([s.temperature or 1.0 for s in settings])
    greedy_B = torch.tensor([s.temperature == 0 for s in settings])
    p_BV = torch.softmax(logits_BV if bool((temperature_B == 1).all()) else logits_BV / temperature_B[:, None], -1)
    kept_BV = _truncate(p_BV, settings)
    token_B = _draw(kept_BV, torch.from_numpy(uniform_B))
    if greedy_B.any():
        token_B = torch.where(greedy_B, logits_BV.argmax(-1), token_B)
    pick_B1 = token_B[:, None]
    p_B = p_BV.gather(1, pick_B1)[:, 0]
    sampled_B = p_B if kept_BV is p_BV else kept_BV.gather(1, pick_B1)[:, 0] / kept_BV.sum(-1)
    return token_B, p_B.log(), sampled_B.log().masked_fill(greedy_B, 0.0)


def _draw(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverts the cumulative distribution in two steps: the block of the vocabulary, then the token within it.

    Cumulative sums in float64 favour no token by rounding, but over a whole vocabulary they would cost more than the
    rest of the sampler; so only one block of each row is summed token by token.
    """
    if p_BV.shape[1] <= _BLOCK:
        return _invert(p_BV, uniform_B[:, None])[0][:, 0]
    p_BKv = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[1] % _BLOCK)).view(len(p_BV), -1, _BLOCK)
    block_B1, within_B1 = _invert(p_BKv.sum(-1), uniform_B[:, None])
    token_B1, _ = _invert(p_BKv[torch.arange(len(p_BV)), block_B1[:, 0]], within_B1)
    return (block_B1 * _BLOCK + token_B1)[:, 0].clamp_(max=p_BV.shape[1] - 1)


def _invert(weight_BK: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The column at which the cumulative weight passes `share` of the whole, and how far within it, as a share of it.

    A column of weight 0 is never chosen. Rows of NaN get some column: their log-probabilities tell.
    """
    cumulative_BK = weight_BK.double().cumsum(1)
    total_B1 = cumulative_BK[:, -1:]
    at_B1 = torch.minimum(share_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))  # rounding may reach it
    column_B1 = torch.searchsorted(cumulative_BK, at_B1, right=True).clamp_(max=weight_BK.shape[1] - 1)
    end_B1, own_B1 = cumulative_BK.gather(1, column_B1), weight_BK.gather(1, column_B1)
    return column_B1, (1 - (end_B1 - at_B1) / own_B1).clamp_(min=0)


def _truncate(p_BV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Sets what top-k and top-p exclude to 0; the same tensor when no row truncates."""
    if all(s.top_p >= 1.0 and not s.top_k for s in settings):
        return p_BV
    size = p_BV.shape[-1]
    sorted_BV, order_BV = p_BV.sort(-1, descending=True)
    rank_V = torch.arange(size)
    top_k_B1 = torch.tensor([[s.top_k or size] for s in settings])
    top_p_B1 = torch.tensor([[s.top_p] for s in settings])
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    drop_BV = (rank_V[None, :] >= top_k_B1) | ((before_BV >= top_p_B1) & (top_p_B1 < 1.0))
    drop_BV[:, 0] = False
    return p_BV.masked_fill(torch.zeros_like(drop_BV).scatter_(1, order_BV, drop_BV), 0.0)
