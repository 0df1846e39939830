"""A control: every finished rollout gets the reward of another one, before anything is filtered by reward.

What is then trained on is as good as what is not, so whatever still rises is not learned from the rewards.
"""

from __future__ import annotations

import random

_POOL = 64


class RewardShuffle:
    """Swaps each reward with a random earlier one out of a pool; the share of successes stays what it was."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._pool: list[float] = []

    def swap(self, reward: float) -> float | None:
        """Another rollout's reward; None while the pool fills up: there is none to give yet."""
        if len(self._pool) < _POOL:
            self._pool.append(reward)
            return None
        place = self._rng.randrange(_POOL)
        other, self._pool[place] = self._pool[place], reward
        return other
