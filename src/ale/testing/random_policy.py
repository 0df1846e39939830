"""A `Policy` without a model that samples tokens at random, and remembers every one of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np

from ale.errors import PolicyError
from ale.messages import Generate, Turn
from ale.wire import Array


class RandomPolicy:
    """`RandomPolicy(ids, end=2)`: draws from `ids`, and the end-of-turn token with probability `end_share`.

    A token depends on seed and position alone, as in the embedded engine: a turn that is asked for in pieces is the
    turn that is asked for at once. `log` holds every answered request with its turn, in order; `abandoned` and `ended`
    name sessions. A turn takes `breaths` turns of the event loop.
    """

    def __init__(self, ids: Sequence[int], end: int, *, end_share: float = 0.08, breaths: int = 3) -> None:
        self.version = 0
        self.log: list[tuple[Generate, Turn]] = []
        self.abandoned: list[str] = []
        self.ended: list[str] = []
        self._ids = list(ids)
        self._end = end
        self._end_share = end_share
        self._breaths = breaths

    async def generate(self, request: Generate) -> Turn:
        prompt = request.prompt_T.numpy()
        if not len(prompt):
            raise PolicyError("the prompt is empty")
        try:
            for _ in range(self._breaths):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.abandoned.append(request.session)
            raise
        tokens: list[int] = []
        logp: list[float] = []
        while len(tokens) < request.sampling.max_tokens and (not tokens or tokens[-1] != self._end):
            rng = random.Random(f"{request.sampling.seed} {len(prompt) + len(tokens)}")
            tokens.append(self._end if rng.random() < self._end_share else rng.choice(self._ids))
            logp.append(-rng.random())
        turn = Turn(
            tokens_A=Array.of(tokens, "int32"),
            logp_A=Array.of(logp, "float32"),
            logp_sampled_A=Array.of(logp, "float32"),
            version_A=Array.of(np.full(len(tokens), self.version), "int32"),
            finish="stop" if tokens[-1] == self._end else "length",
        )
        self.log.append((request, turn))
        return turn

    async def end_session(self, session: str) -> None:
        self.ended.append(session)

    async def load_weights(self, version: int, slot: int) -> None:
        self.version = version
