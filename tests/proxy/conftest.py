from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest

from ale.proxy.episode import Episode
from ale.proxy.server import Proxy, open_proxy, train_mode
from ale.sandbox import SandboxEngine, open_engine

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Runs a command.",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
    }
]
RESPONSES_TOOLS: list[Any] = [{"type": "function", "strict": False, **TOOLS[0]["function"]}]
ANTHROPIC_TOOLS: list[Any] = [{"name": "bash", "input_schema": TOOLS[0]["function"]["parameters"]}]

# Tools in the prompt and calls in tags, as Qwen's templates have them.
TAGS_TEMPLATE = (
    "{%- if tools %}{{ '<|system|>Tools: ' + (tools | tojson) + '<tool_call></tool_call><|end|>' }}{% endif -%}"
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
THINKING_TEMPLATE = TAGS_TEMPLATE.replace("m['content'] +", "m['content'].split('</think>')[-1] +")


def openai_client(proxy: Proxy, key: str, **options: Any) -> openai.AsyncOpenAI:
    """The official client, over loopback; nothing is retried unless a test says so."""
    return openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 20} | options)


def anthropic_client(proxy: Proxy, key: str, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=str(proxy.url), api_key=key, **{"max_retries": 0, "timeout": 20} | options)


Serve = Callable[..., AbstractAsyncContextManager[tuple[Proxy, Episode]]]


@pytest.fixture
def serve(nano_tokenizer: Any) -> Serve:
    """`async with serve(policy) as (proxy, episode)`: a proxy on a loopback port with one open episode."""

    @asynccontextmanager
    async def open_one(policy: Any, *, template: str | None = None, **options: Any) -> AsyncIterator[Any]:
        if template is not None:
            nano_tokenizer.chat_template = template
        mode = train_mode(policy, nano_tokenizer, places=options.pop("places", 64))
        async with open_proxy(mode, port=0) as proxy, proxy.episode("g/0", **options) as episode:
            yield proxy, episode

    return open_one


@pytest.fixture
def without_a_socket() -> Callable[[Proxy, str], openai.AsyncOpenAI]:
    """The official client on the application itself: for scenarios by the hundred."""

    def make(proxy: Proxy, key: str) -> openai.AsyncOpenAI:
        transport = httpx.ASGITransport(proxy.app)  # type: ignore[arg-type]
        http = httpx.AsyncClient(transport=transport)
        return openai.AsyncOpenAI(base_url="http://proxy/v1", api_key=key, max_retries=0, http_client=http)

    return make


@pytest.fixture(scope="module")
def sandboxes(loop: asyncio.Runner) -> Iterator[SandboxEngine]:
    """An engine of a file's own: it keeps a copy of what is mounted."""
    manager = open_engine("local")
    engine = loop.run(manager.__aenter__())
    yield engine
    assert engine.statistics().alive == 0
    loop.run(manager.__aexit__(None, None, None))
