"""Who may ask, how much, in which turn, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import openai
import pytest

from ale.agent.chat import Chat
from ale.errors import PolicyError
from ale.messages import Generate, Sampling, Turn
from ale.proxy.dialogue import Refusal
from ale.proxy.episode import Limits
from ale.proxy.turnstile import Turnstile
from ale.testing import clock
from ale.testing.random_policy import RandomPolicy
from ale.testing.scripted_policy import ScriptedPolicy

from .conftest import Serve, anthropic_client, openai_client

GO: list[Any] = [{"role": "user", "content": "Go."}]


@pytest.fixture
def chat(nano_tokenizer: Any) -> Chat:
    return Chat(nano_tokenizer)


async def ask(client: openai.AsyncOpenAI, **options: Any) -> Any:
    return await client.chat.completions.create(**{"model": "m", "messages": GO} | options)


def test_only_the_key_of_an_open_episode_opens_it(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        async with serve(ScriptedPolicy(chat, "x", "x")) as (proxy, episode):
            async with proxy.episode("g/1") as other:
                assert other.key != episode.key
                closed = other.key
            for key in ("wrong", closed, episode.key[:-1], "ale-"):
                async with openai_client(proxy, key) as client:
                    with pytest.raises(openai.AuthenticationError, match="incorrect API key"):
                        await ask(client)
                    with pytest.raises(openai.AuthenticationError):
                        await client.models.list()
                async with anthropic_client(proxy, key) as client:
                    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
                        await client.messages.create(model="m", max_tokens=5, messages=GO)
            assert (episode.usage.requests, other.usage.requests) == (0, 0)
            async with openai_client(proxy, episode.key) as client:
                await ask(client)
                with pytest.raises(openai.NotFoundError):
                    await client.models.retrieve("no-such-model")
            assert (episode.usage.requests, other.usage.requests) == (1, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("limits", "answers"),
    [(Limits(max_requests=2), 2), (Limits(max_tokens=5, max_turn_tokens=3), 2), (Limits(time_s=-1), 0)],
)
def test_an_episode_beyond_its_budget_is_over(serve: Serve, chat: Chat, limits: Limits, answers: int) -> None:
    async def scenario() -> None:
        policy = RandomPolicy([9], chat.end, end_share=0)
        async with (
            serve(policy, limits=limits) as (proxy, episode),
            openai_client(proxy, episode.key, max_retries=2) as client,
        ):
            for _ in range(answers):
                assert not episode.over.is_set()
                await ask(client)
            for _ in range(2):
                with pytest.raises(openai.PermissionDeniedError, match="the episode is over: it has used its"):
                    await ask(client)
            assert episode.over.is_set()
            assert episode.usage.requests <= answers + 1
            assert episode.usage.sampled <= limits.max_tokens

    asyncio.run(scenario())


def test_a_failure_of_the_engine_is_told_and_marks_the_episode(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        class FailsOnce(ScriptedPolicy):
            async def generate(self, request: Generate) -> Turn:
                if not self.ended:
                    self.ended.append("failed")
                    raise PolicyError("no memory")
                return await super().generate(request)

        policy = FailsOnce(chat, "fine")
        async with serve(policy) as (proxy, episode), openai_client(proxy, episode.key) as client:
            with pytest.raises(openai.InternalServerError, match="no memory"):
                await ask(client)
            assert episode.failed == "PolicyError: no memory"
            assert (await ask(client)).choices[0].message.content == "fine"

    asyncio.run(scenario())


def test_the_runs_sampling_holds_where_it_is_pinned(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(chat, "a", "b")
        own = Sampling(temperature=0.7, top_k=5, seed=100)
        async with (
            serve(policy, sampling=own, pinned=True) as (proxy, episode),
            openai_client(proxy, episode.key) as client,
        ):
            await ask(client, temperature=0, seed=1)
            await ask(client, temperature=0.7)
            assert [(r.sampling.temperature, r.sampling.top_k) for r in policy.requests] == [(0.7, 5)] * 2
            assert [r.sampling.seed for r in policy.requests] == [101, 102]
            assert episode.counts == {"overridden": 1}

    asyncio.run(scenario())


class Stuck:
    """Begins to generate and never ends; says when it was told to stop."""

    version = 0

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def generate(self, request: Generate) -> Turn:
        self.begun.set()
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def end_session(self, session: str) -> None:
        self.ended.put_nowait(session)

    async def load_weights(self, version: int, slot: int) -> None: ...


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_generation(serve: Serve, stream: bool) -> None:
    async def scenario() -> None:
        policy = Stuck()
        async with serve(policy, places=1) as (proxy, episode), openai_client(proxy, episode.key) as client:
            asking = asyncio.ensure_future(ask(client, stream=stream))
            await policy.begun.wait()
            asking.cancel()
            async with asyncio.timeout(30):
                assert await policy.ended.get() == "g/0"
            while episode.running:
                await asyncio.sleep(0)
            assert episode.usage.abandoned == 1
            assert not episode.busy_lanes

    asyncio.run(scenario())


def test_closing_an_episode_ends_its_requests(serve: Serve) -> None:
    async def scenario() -> None:
        policy = Stuck()
        async with serve(policy) as (proxy, _):
            async with proxy.episode("g/1") as episode:
                client = openai_client(proxy, episode.key)
                asking = asyncio.ensure_future(ask(client))
                await policy.begun.wait()
            assert all(task.done() for task in episode.running)
            with pytest.raises(openai.APIError):
                await asking
            await client.close()

    asyncio.run(scenario())


def test_episodes_take_turns_however_many_requests_each_has() -> None:
    async def scenario() -> None:
        turnstile, order = Turnstile(1), []

        async def one(episode: str) -> None:
            async with turnstile.passing(episode, deadline_s=100):
                order.append(episode)
                await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group:
            for episode in "aaaaabbc":
                group.create_task(one(episode))
                await asyncio.sleep(0)
        assert "".join(order) == "aabcabaa"
        assert turnstile.queued == 0

    clock.run(scenario())


def test_a_place_is_not_lost_whoever_gives_up_waiting_for_it() -> None:
    async def scenario() -> None:
        turnstile = Turnstile(1, waiting=2)

        async def hold(seconds: float, deadline_s: float = 100) -> None:
            async with turnstile.passing("a", deadline_s=deadline_s):
                await asyncio.sleep(seconds)

        first = asyncio.ensure_future(hold(10))
        await asyncio.sleep(0)
        late, gone = asyncio.ensure_future(hold(1, 5)), asyncio.ensure_future(hold(1))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="wait already"):
            await hold(1)
        with pytest.raises(Refusal, match="no place at the engine within 5 s"):
            await late
        gone.cancel()
        await first
        await asyncio.gather(gone, return_exceptions=True)
        await hold(1, 1)
        assert turnstile.queued == 0

    clock.run(scenario())


def test_a_reader_that_takes_nothing_does_not_hold_others(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        policy = RandomPolicy(range(10, 200), chat.end, end_share=0)
        limits = Limits(max_turn_tokens=30_000, max_context_tokens=40_000)
        async with serve(policy, places=1, limits=limits) as (proxy, episode):
            host, port = str(proxy.url).removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1)
            body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 30000, "stream": true}'
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {episode.key}\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await reader.read(1)
            async with proxy.episode("g/1") as other, openai_client(proxy, other.key) as client:
                for _ in range(3):
                    await ask(client, max_tokens=4)
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    asyncio.run(scenario())
