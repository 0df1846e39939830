"""Deploy and replay: the upstream is another proxy of this kind, or a server that fails as it is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ale.agent.chat import Chat
from ale.proxy.replay import Replay
from ale.proxy.server import open_proxy
from ale.proxy.upstream import Deploy, Upstream, open_deploy
from ale.testing.scripted_policy import ScriptedPolicy

from .conftest import TOOLS, Serve, anthropic_client, openai_client

GO: list[Any] = [{"role": "user", "content": "Go."}]


@pytest.fixture
def chat(nano_tokenizer: Any) -> Chat:
    return Chat(nano_tokenizer)


async def converse(proxy: Any, key: str) -> list[Any]:
    """Three requests of an agent; what came back, as it came over the wire."""
    async with openai_client(proxy, key) as client, anthropic_client(proxy, key) as other:
        first = await client.chat.completions.with_raw_response.create(model="m", messages=GO, tools=TOOLS)
        async with client.chat.completions.with_streaming_response.create(
            model="m", messages=GO, stream=True, stream_options={"include_usage": True}
        ) as second:
            streamed = b"".join([piece async for piece in second.iter_bytes()])
        third = await other.messages.with_raw_response.create(model="m", max_tokens=9, messages=GO)
        return [first.content, streamed, await third.read()]


def test_deployed_and_replayed_an_agent_sees_the_same_bytes(serve: Serve, chat: Chat, tmp_path: Path) -> None:
    async def scenario() -> None:
        policy, journal = ScriptedPolicy(chat, "```bash\nls\n```"), tmp_path / "j.jsonl"
        async with serve(policy) as (inner, upstream_episode):
            upstream = Upstream(
                openai=f"{inner.url}/v1", anthropic=inner.url, key=upstream_episode.key, model="their-name"
            )
            async with open_deploy(upstream) as mode, open_proxy(mode, port=0) as outer:
                async with outer.episode("e", journal=journal) as episode:
                    seen = await converse(outer, episode.key)
                assert episode.usage.sampled == upstream_episode.usage.sampled > 0
        assert b'"model":"their-name"' in seen[0]
        async with open_proxy(Replay(journal), port=0) as proxy, proxy.episode("again") as episode:
            assert await converse(proxy, episode.key) == seen
            with pytest.raises(openai.ConflictError, match="no \\(further\\) answer"):
                await converse(proxy, episode.key)

    asyncio.run(scenario())


def failing(*answers: httpx.Response | Exception) -> tuple[Deploy, list[httpx.Request]]:
    seen: list[httpx.Request] = []
    waiting = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = waiting.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    client = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    return Deploy(Upstream(openai="http://up/v1", key="secret", retries=1), client), seen


BUSY, NO = httpx.Response(429, headers={"retry-after": "0"}), httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("answers", "status", "requests"),
    [
        ((BUSY, httpx.Response(200, json={"ok": 1})), 200, 2),
        ((NO, httpx.Response(200, json={"ok": 1})), 200, 2),
        ((NO, NO), 502, 2),
        ((BUSY, httpx.Response(429)), 429, 2),
        ((httpx.ReadTimeout("slow"),), 504, 1),
        ((httpx.ReadError("broke"),), 502, 1),
        ((httpx.Response(500),), 500, 1),
        ((httpx.Response(401),), 502, 1),
    ],
    ids=str,
)
def test_only_what_the_upstream_cannot_have_worked_on_is_repeated(
    answers: tuple[Any, ...], status: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ale.proxy.upstream._PAUSE_S", 0.0)
    mode, seen = failing(*answers)

    async def scenario() -> None:
        async with open_proxy(mode, port=0) as proxy, proxy.episode("e") as episode, httpx.AsyncClient() as client:
            answer = await client.post(
                f"{proxy.url}/v1/chat/completions",
                json={"messages": GO},
                headers={"authorization": f"Bearer {episode.key}", "cookie": "private"},
            )
            assert (answer.status_code, len(seen)) == (status, requests)
            assert seen[0].headers["authorization"] == "Bearer secret"
            assert "cookie" not in seen[0].headers
            assert "secret" not in answer.text

    asyncio.run(scenario())
