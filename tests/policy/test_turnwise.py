"""Turns of one version each: new weights wait for the turns under way, and turns that last too long begin again."""

from __future__ import annotations

import asyncio

import pytest

from ale.errors import DeadlineExceeded, PolicyError
from ale.messages import Generate, Sampling, Turn
from ale.policy.turnwise import TurnwisePolicy
from ale.testing.clock import run
from ale.wire import Array


class TokenwisePolicy:
    """A token a second, each of the version that is live then, as the embedded engine does it."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.version = 0
        self.asked: list[tuple[str, float]] = []
        self._deaf = deaf
        self._ended: dict[str, asyncio.Event] = {}

    async def generate(self, request: Generate) -> Turn:
        clock = asyncio.get_running_loop()
        self.asked.append((request.session, clock.time()))
        ended = self._ended.setdefault(request.session, asyncio.Event())
        ended.clear()
        versions = []
        for _ in range(request.sampling.max_tokens):
            versions.append(self.version)
            await asyncio.sleep(1.0)
            if ended.is_set() and not self._deaf:
                raise PolicyError(f"session {request.session} was ended")
        n = len(versions)
        return Turn(
            tokens_A=Array.of(range(n), "int32"),
            logp_A=Array.of([-1.0] * n, "float32"),
            logp_sampled_A=Array.of([-1.0] * n, "float32"),
            version_A=Array.of(versions, "int32"),
            finish="length",
        )

    async def end_session(self, session: str) -> None:
        self._ended.setdefault(session, asyncio.Event()).set()

    async def load_weights(self, version: int, slot: int) -> None:
        self.version = version


def ask(session: str, tokens: int) -> Generate:
    return Generate(session=session, prompt_T=Array.of([1], "int32"), sampling=Sampling(max_tokens=tokens))


def test_new_weights_wait_for_the_turns_under_way_and_none_begins_meanwhile() -> None:
    async def scenario() -> None:
        inner = TokenwisePolicy()
        policy = TurnwisePolicy(inner, drain_s=60.0)
        clock = asyncio.get_running_loop()
        first = asyncio.create_task(policy.generate(ask("a", 10)))
        await asyncio.sleep(4.5)
        loading = asyncio.create_task(policy.load_weights(1, 0))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(policy.generate(ask("b", 3)))
        await loading
        assert clock.time() == pytest.approx(10.0)
        assert policy.version == 1
        assert (await first).version_A.numpy().tolist() == [0] * 10
        assert (await second).version_A.numpy().tolist() == [1] * 3
        assert inner.asked == [("a", 0.0), ("b", pytest.approx(10.0))]
        assert policy.restarted == 0

    run(scenario())


def test_a_turn_that_outlasts_the_wait_begins_again_under_the_new_weights_and_is_counted() -> None:
    async def scenario() -> None:
        inner = TokenwisePolicy()
        policy = TurnwisePolicy(inner, drain_s=3.0)
        turns = [asyncio.create_task(policy.generate(ask(s, n))) for s, n in (("a", 4), ("b", 50), ("c", 50))]
        await asyncio.sleep(2.5)
        await policy.load_weights(1, 0)
        versions = [set((await turn).version_A.numpy().tolist()) for turn in turns]
        assert versions == [{0}, {1}, {1}]
        assert policy.restarted == 2
        assert len((await turns[1]).tokens_A) == 50

    run(scenario())


def test_a_turn_that_somebody_else_ended_is_their_error() -> None:
    async def scenario() -> None:
        policy = TurnwisePolicy(TokenwisePolicy(), drain_s=3.0)
        turn = asyncio.create_task(policy.generate(ask("a", 50)))
        await asyncio.sleep(1.5)
        await policy.end_session("a")
        with pytest.raises(PolicyError, match="session a was ended"):
            await turn
        assert policy.restarted == 0
        await policy.load_weights(1, 0)  # nothing is left behind that it would wait for
        assert policy.version == 1

    run(scenario())


def test_a_cancelled_turn_is_not_waited_for() -> None:
    async def scenario() -> None:
        policy = TurnwisePolicy(TokenwisePolicy(), drain_s=1e6)
        turn = asyncio.create_task(policy.generate(ask("a", 1000)))
        await asyncio.sleep(1.5)
        turn.cancel()
        await policy.load_weights(1, 0)
        assert asyncio.get_running_loop().time() == 1.5

    run(scenario())


def test_an_engine_that_does_not_let_go_of_a_turn_is_an_error_that_names_it() -> None:
    async def scenario() -> None:
        policy = TurnwisePolicy(TokenwisePolicy(deaf=True), drain_s=3.0)
        turn = asyncio.create_task(policy.generate(ask("a", 1000)))
        await asyncio.sleep(1.0)
        with pytest.raises(DeadlineExceeded, match="new weights wait for the turns of a"):
            await policy.load_weights(1, 0)
        assert policy.version == 0
        assert len((await turn).tokens_A) == 1000

    run(scenario())
