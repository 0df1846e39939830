from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from ale.messages import Chunk, Generate, Sampling, Turn
from ale.wire import Array

Ask = Callable[..., Generate]
Drive = Callable[..., dict[int, Turn]]


@pytest.fixture
def ask() -> Ask:
    """`ask("s", [1, 2], max_tokens=4, seed=7)`: a request."""

    def make(session: str, prompt: Iterable[int], **sampling: Any) -> Generate:
        return Generate(session=session, prompt_T=Array.of(list(prompt), "int32"), sampling=Sampling(**sampling))

    return make


@pytest.fixture
def drive() -> Drive:
    """`drive(engine, [request, ...])`: the turns, by place in the list."""

    def run(engine: Any, requests: Iterable[Generate] = ()) -> dict[int, Turn]:
        for number, request in enumerate(requests):
            engine.add(number, request)
        turns: dict[int, Turn] = {}
        while engine.busy:
            turns |= dict(engine.step())
        return turns

    return run


@pytest.fixture
def prompts() -> list[list[int]]:
    """Forty prompts of 3 to 30 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(10, 300, rng.integers(3, 31)).tolist() for _ in range(40)]


@pytest.fixture
def training_logp() -> Callable[..., Any]:
    """`training_logp(model, prompt, turn)`: what the learner's forward gives for the turn's tokens, float32 [A]."""
    import torch

    from ale.learner.batch import split
    from ale.learner.forward import action_logp

    def compute(model: Any, prompt: list[int], turn: Turn, temperature: float = 1.0) -> Any:
        tokens = [*prompt, *turn.tokens_A.numpy().tolist()]
        chunk = Chunk(len(prompt), len(tokens), "answer")
        (batch,) = split([Array.of(tokens, "int32")], [(chunk,)], 10_000)
        with torch.no_grad():
            return action_logp(model, batch, temperature)[0].numpy()

    return compute
