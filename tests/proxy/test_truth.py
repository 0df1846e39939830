"""On a real model: the training forward of every sequence gives the log-probabilities that were recorded."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
import torch

from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.messages import Generate, Sampling, Turn
from ale.policy.engine import Engine
from ale.proxy.server import Proxy, train_mode

from .test_record import ACTS, Agent, sequences

TOLERANCE = 1e-3


class InProcess:
    """The embedded engine without its process. Requests that come together run together."""

    def __init__(self, engine: Engine) -> None:
        self.version = 0
        self._engine = engine
        self._turns: dict[int, Turn] = {}
        self._number = 0

    async def generate(self, request: Generate) -> Turn:
        self._number += 1
        number = self._number
        self._engine.add(number, request)
        await asyncio.sleep(0)
        while number not in self._turns:
            self._turns |= dict(self._engine.step())
            await asyncio.sleep(0)
        return self._turns.pop(number)

    async def end_session(self, session: str) -> None:
        self._engine.end_session(session)

    async def load_weights(self, version: int, slot: int) -> None: ...


@pytest.mark.parametrize("seed", [1, 2])
def test_recorded_log_probabilities_are_those_of_the_training_forward(
    nano: Any, nano_tokenizer: Any, without_a_socket: Any, seed: int
) -> None:
    proxy = Proxy(train_mode(InProcess(Engine(nano, rows=8)), nano_tokenizer), "m")
    acts = [*dict.fromkeys(ACTS)] * 2

    async def scenario() -> Any:
        sampling = Sampling(temperature=0.8, seed=3)
        async with proxy.episode("g/0", sampling=sampling, pinned=True) as episode:
            agent = Agent(without_a_socket(proxy, episode.key), random.Random(seed))
            for act in acts:
                await agent.step(act)
            await agent.client.close()
        return episode

    episode = asyncio.run(scenario())
    found = sequences(episode)
    assert len(found) > 5
    assert episode.tree.counts["spliced"] + episode.tree.counts["forks"] > 3
    worst = 0.0
    for t in found:
        (batch,) = split([t.tokens_T], [t.chunks], 100_000)
        with torch.no_grad():
            logp_A = action_logp(nano, batch, 0.8)[0].numpy()
        worst = max(worst, float(np.abs(logp_A - t.logp_A.numpy()).max()))
    assert worst < TOLERANCE
