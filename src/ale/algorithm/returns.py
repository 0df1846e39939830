"""Discounted chunk returns (arXiv 2512.24873, eq. 7), for whoever wants to look at them outside the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def chunk_returns(
    advantage: float, chunks: int, *, gamma: float = 0.95, outcome: int | None = None, rewards_K: Sequence[float] = ()
) -> npt.NDArray[np.float64]:
    """G_k = r_k + gamma G_{k+1} of one trajectory of `chunks` chunks, float64 [K].

    `advantage` is added at the outcome chunk (the last, unless named); `rewards_K` are intrinsic rewards. Without them
    this is gamma^(j-k) * advantage up to the outcome chunk j and 0 after it. The loss computes the same by itself for a
    whole batch.
    """
    rewards = np.zeros(chunks) if len(rewards_K) == 0 else np.array(rewards_K, dtype=np.float64)
    if rewards.shape != (chunks,):
        raise ValueError(f"rewards_K: expected one reward for each of the {chunks} chunks, got {len(rewards_K)}")
    if chunks:
        place = chunks - 1 if outcome is None else outcome
        if not 0 <= place < chunks:
            raise ValueError(f"outcome: expected a chunk in 0..{chunks - 1}, got {outcome}")
        rewards[place] += advantage
    for k in range(chunks - 2, -1, -1):
        rewards[k] += gamma * rewards[k + 1]
    return rewards
