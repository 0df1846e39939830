"""Mode *deploy*: requests go on to another server, their answers come back as they are, and the record is the same.

A request is repeated only where the upstream cannot have worked on it: no connection came about, or it said so itself
(429, 503, 529). Whatever breaks later is told to the client, which alone knows whether to ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import orjson

from ale.proxy.app import Call, Out
from ale.proxy.dialogue import Refusal
from ale.proxy.episode import Episode
from ale.proxy.tree import TokenTree

_TURNED_AWAY = frozenset({429, 503, 529})
_PASSED_ON = ("anthropic-version", "anthropic-beta")
_PASSED_BACK = ("request-id", "x-request-id", "retry-after")
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests go: `Upstream(openai="https://api.example.com/v1", key=os.environ["OPENAI_API_KEY"])`.

    `openai` and `anthropic` are base URLs as their clients take them (with and without `/v1`); None: that API is not
    offered. `model` replaces the name that an agent sends.
    """

    openai: str | None = None
    anthropic: str | None = None
    key: str = ""
    model: str | None = None
    connect_s: float = 10.0
    silence_s: float = 300.0
    """The longest wait for the next byte."""
    total_s: float = 1800.0
    retries: int = 2
    connections: int = 512


class Deploy:
    """Use `open_deploy`."""

    def __init__(self, upstream: Upstream, client: httpx.AsyncClient) -> None:
        self._upstream = upstream
        self._client = client

    def tree(self) -> TokenTree | None:
        return None

    async def respond(self, episode: Episode, call: Call, out: Out) -> None:
        url, headers = self._address(call)
        body = self._renamed(call.body)
        try:
            async with asyncio.timeout(min(self._upstream.total_s, episode.time_left_s)):
                for left in range(self._upstream.retries, -1, -1):
                    pause_s = await self._once(episode, url, headers, body, out, last=not left)
                    if pause_s is None:
                        return
                    await asyncio.sleep(pause_s)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise Refusal(504, "the upstream gave no answer in time", kind="server_error") from error
        except httpx.HTTPError as error:
            raise Refusal(502, f"the upstream failed: {type(error).__name__}", kind="server_error") from error

    async def end(self, episode: Episode) -> None:
        pass

    async def _once(
        self, episode: Episode, url: str, headers: dict[str, str], body: bytes, out: Out, *, last: bool
    ) -> float | None:
        """One attempt; how long to wait before another one that is safe and allowed, None when it is over."""
        try:
            async with self._client.stream("POST", url, content=body, headers=headers) as answer:
                if answer.status_code in _TURNED_AWAY and not last:
                    return _retry_after(answer)
                if answer.status_code in (401, 403):
                    raise Refusal(502, "the upstream refuses the proxy's own key", kind="server_error")
                kind = answer.headers.get("content-type", "application/json")
                back = [(n.encode(), answer.headers[n].encode()) for n in _PASSED_BACK if n in answer.headers]
                await out.start(answer.status_code, kind, tuple(back))
                meter = _Meter()
                try:
                    async for piece in answer.aiter_bytes():
                        meter.see(piece)
                        await out.write(piece)
                finally:
                    episode.usage.sampled += meter.tokens()
                await out.end()
                return None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if last:
                raise
            return _PAUSE_S

    def _address(self, call: Call) -> tuple[str, dict[str, str]]:
        u = self._upstream
        headers = {"content-type": "application/json"}
        headers |= {name: call.headers[name] for name in _PASSED_ON if name in call.headers}
        if call.api == "anthropic" and u.anthropic is not None:
            return u.anthropic.rstrip("/") + call.path, headers | {"x-api-key": u.key}
        if call.api == "openai" and u.openai is not None:
            return u.openai.rstrip("/") + call.path.removeprefix("/v1"), headers | {"authorization": f"Bearer {u.key}"}
        raise Refusal(404, f"this proxy forwards to no upstream that speaks {call.api}'s API")

    def _renamed(self, body: bytes) -> bytes:
        if self._upstream.model is None:
            return body
        try:
            tree: Any = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refusal(400, f"the body is not valid JSON: {error}") from error
        if not isinstance(tree, dict):
            raise Refusal(400, "the body must be a JSON object")
        return orjson.dumps(tree | {"model": self._upstream.model})


class _Meter:
    """Finds what an answer says it cost: the last `usage` in it, whole or in a stream's events."""

    _KEEP = 65536

    def __init__(self) -> None:
        self._tail = b""

    def see(self, piece: bytes) -> None:
        self._tail = (self._tail + piece)[-self._KEEP :]

    def tokens(self) -> int:
        for line in reversed(self._tail.splitlines()):
            if b'"usage"' not in line:
                continue
            try:
                data = orjson.loads(line.removeprefix(b"data:").strip())
            except orjson.JSONDecodeError:
                continue
            usage = data.get("usage") or (data.get("response") or {}).get("usage") or {}
            return int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)
        return 0


def _retry_after(answer: httpx.Response) -> float:
    try:
        return min(float(answer.headers.get("retry-after", 1.0)), _LONGEST_PAUSE_S)
    except ValueError:
        return 1.0


@asynccontextmanager
async def open_deploy(upstream: Upstream) -> AsyncIterator[Deploy]:
    """Holds the connections to the upstream."""
    timeout = httpx.Timeout(upstream.silence_s, connect=upstream.connect_s)
    limits = httpx.Limits(max_connections=upstream.connections, max_keepalive_connections=upstream.connections)
    async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
        yield Deploy(upstream, client)
