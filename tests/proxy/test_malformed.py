"""Whatever comes as a body, the answer is 4xx: never a 500, never silence."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.agent.chat import Chat
from ale.models.load import load_tokenizer
from ale.proxy import app
from ale.proxy.server import Proxy, train_mode
from ale.testing.random_policy import RandomPolicy

from .conftest import ANTHROPIC_TOOLS, RESPONSES_TOOLS, TOOLS, Serve

CALL = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
        ],
        "tools": TOOLS,
        "tool_choice": "auto",
        "stop": ["a"],
        "temperature": 1.0,
        "max_tokens": 3,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {"model": "m", "prompt": [4, 5], "max_tokens": 3, "stop": "a"},
    "/v1/messages": {
        "model": "m",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "bash", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]},
        ],
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": {"type": "auto"},
    },
    "/v1/responses": {
        "model": "m",
        "input": [
            {"role": "user", "content": "x"},
            {"type": "function_call", "call_id": "c", "name": "bash", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "ok"},
        ],
        "tools": RESPONSES_TOOLS,
        "max_output_tokens": 3,
    },
}
WRONG: tuple[Any, ...] = (None, True, -1, 1e308, 2**70, "x", "\ud800", "\0", [], {}, [[]], {"a": {}}, [None], [{}])
PATHS = sorted(GOOD)


@pytest.fixture(scope="module")
def proxy(nano_path: Any) -> Proxy:
    tokenizer = load_tokenizer(nano_path)
    policy = RandomPolicy(range(20, 200), tokenizer.eos_token_id)
    return Proxy(train_mode(policy, tokenizer), "m")


def post(proxy: Proxy, *requests: tuple[str, bytes]) -> list[httpx.Response]:
    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(proxy.app)  # type: ignore[arg-type]
        async with (
            proxy.episode("fuzz") as episode,
            httpx.AsyncClient(transport=transport, base_url="http://proxy") as client,
        ):
            headers = {"authorization": f"Bearer {episode.key}"}
            async with asyncio.timeout(60):
                return [await client.post(path, content=body, headers=headers) for path, body in requests]

    return asyncio.run(scenario())


def deep(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("path", PATHS)
def test_a_good_body_is_answered(proxy: Proxy, path: str) -> None:
    (answer,) = post(proxy, (path, json.dumps(GOOD[path]).encode()))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe\x00",
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}",
        b"x" * 1000,
    ],
    ids=range(11),
)
def test_what_is_no_request_gets_400(proxy: Proxy, path: str, body: bytes) -> None:
    (answer,) = post(proxy, (path, body))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_a_truncated_body_gets_400(proxy: Proxy, path: str) -> None:
    whole = json.dumps(GOOD[path]).encode()
    answers = post(proxy, *((path, whole[:length]) for length in range(0, len(whole), 7)))
    assert {answer.status_code for answer in answers} == {400}


@pytest.mark.parametrize("where", ["tools", "input"])
def test_a_hundred_levels_of_schema_are_refused(proxy: Proxy, where: str) -> None:
    parameters = {"a": deep(100)}
    if where == "tools":
        path, body = (
            "/v1/chat/completions",
            GOOD["/v1/chat/completions"]
            | {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]},
        )
    else:
        use = {"type": "tool_use", "id": "t", "name": "f", "input": parameters}
        path = "/v1/messages"
        body = GOOD[path] | {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [use]}]}
    (answer,) = post(proxy, (path, json.dumps(body).encode()))
    assert (answer.status_code, "nested more than 64" in answer.text) == (400, True)


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(PATHS), seed=st.integers(0, 2**32), value=st.sampled_from(WRONG))
def test_a_wrong_value_anywhere_is_refused_or_harmless(proxy: Proxy, path: str, seed: int, value: Any) -> None:
    body = json.loads(json.dumps(GOOD[path]))
    rng, node = random.Random(seed), body
    while True:
        key = rng.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
        else:
            node[key] = value
            break
    (answer,) = post(proxy, (path, json.dumps(body).encode()))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_beyond_the_limit_gets_413_whether_it_says_so_or_not(proxy: Proxy, monkeypatch: Any) -> None:
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)

    async def chunks() -> Any:
        for _ in range(200):
            yield b"x" * 10

    (declared,) = post(proxy, (PATHS[0], b"x" * 1001))
    (streamed,) = post(proxy, (PATHS[0], chunks()))  # type: ignore[arg-type]
    assert declared.status_code == streamed.status_code == 413


def test_a_connection_that_breaks_off_in_its_body_leaves_nothing(serve: Serve, nano_tokenizer: Any) -> None:
    async def scenario() -> None:
        policy = RandomPolicy([9], Chat(nano_tokenizer).end)
        async with serve(policy) as (proxy, episode):
            host, port = str(proxy.url).removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {episode.key}\r\n"
            writer.write(f"{head}content-length: 999\r\n\r\n{{".encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"401" in await reader.readline()
            writer.close()
            await writer.wait_closed()
        assert (episode.usage.requests, policy.log) == (0, [])

    asyncio.run(scenario())
