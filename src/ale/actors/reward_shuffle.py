"""A control: every finished rollout gets the reward of another one, before anything is filtered by reward.

What is then trained on is as good as what is not, so whatever still rises is not learned from the rewards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ale.data.events import Exchange

_POOL = 64


def exchange(pool: Sequence[float], number: int, seed: int, earned: float) -> tuple[Exchange, float | None]:
    """The `number`-th finished rollout puts what it `earned` into the pool and takes out an earlier reward.

    None while the pool fills up: there is none to give yet. The share of successes stays what it was. Which place is
    chosen depends on `number` and `seed` alone, so a resumed run goes on as it would have.
    """
    if len(pool) < _POOL:
        return Exchange(len(pool), earned), None
    place = random.Random(f"{seed}/{number}").randrange(_POOL)
    return Exchange(place, earned), pool[place]
