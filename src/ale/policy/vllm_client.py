"""One vLLM server over HTTP: tokens in, tokens out, and the calls that change its weights.

The tokens come from `/inference/v1/generate`, which takes and gives ids, log-probabilities and the label of the weights
that sampled each token; the rest are vLLM's development routes for reinforcement learning.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ale.errors import PolicyError

FLAGS = (
    "--enable-scale-out",
    "--logprobs-mode",
    "processed_logprobs",
    "--generation-config",
    "vllm",
    "--enable-prefix-caching",
    "--worker-extension-cls",
    "ale.policy.vllm_worker.WeightLoader",
)
"""What a server is started with to be usable here, beside VLLM_SERVER_DEV_MODE=1."""

HOW_TO_START = f"VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model DIR {' '.join(FLAGS)}"

_NO_PROBABILITY = -9999.0  # JSON has no NaN and no infinity: what vLLM says in their place
_CONNECT_S = 10.0
_SAID = 600  # characters of an error's body that are worth repeating


class ServerGone(PolicyError):
    """The server does not answer, or its engine has died: another, or itself started again, may carry on."""


class Span(msgspec.Struct, frozen=True):
    """`Span(version="4", start=0, end=17)`: the weights of these tokens of one answer."""

    version: str
    start: int
    end: int


class _Logp(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float


class _Logps(msgspec.Struct, frozen=True):
    content: list[_Logp] | None = None


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logps | None = None
    weight_versions: list[Span] | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    error: dict[str, Any] | None = None


class Piece(msgspec.Struct, frozen=True):
    """Some more tokens of an answer. The last one says how it ended, and which weights sampled what."""

    tokens: list[int]
    logp: list[float]
    finish: str | None = None
    spans: list[Span] | None = None


_chunks = msgspec.json.Decoder(_Chunk)


class VllmClient:
    """`VllmClient("http://127.0.0.1:8000")`; with `socket` the connection goes through that unix socket."""

    def __init__(self, url: str, *, socket: Path | None = None) -> None:
        self.url = url.rstrip("/")
        # limit=0: as many streams as there are episodes. force_close: a connection kept for later is closed by the
        # server after some seconds, and the turn that comes upon it in that moment is lost. Deadlines are the caller's.
        connector: aiohttp.BaseConnector
        if socket is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
        else:
            connector = aiohttp.UnixConnector(str(socket), limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def close(self) -> None:
        await self._http.close()

    async def healthy(self, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                await self._ask("GET", "/health")
        except (ServerGone, PolicyError, TimeoutError):
            return False
        return True

    async def generate(self, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece. Leaving early closes the connection, which has the server drop the request.

        Raises `ServerGone` when the stream breaks off, `PolicyError` when the request is refused.
        """
        try:
            async with self._http.post(f"{self.url}/inference/v1/generate", json=body) as response:
                await self._check(response, "/inference/v1/generate")
                async for event in _events(response.content):
                    piece = _piece(event)
                    if piece is not None:
                        yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{self.url} broke off an answer: {type(error).__name__}: {error}") from error

    async def pause(self) -> None:
        """Requests stay where they are, to go on after `resume`. Returns once nothing is computed any more."""
        await self._ask("POST", "/pause?mode=keep&clear_cache=false")

    async def resume(self) -> None:
        await self._ask("POST", "/resume")

    async def load(self, path: Path) -> None:
        """The weights in this Hugging Face directory, which the server has to see under the same path."""
        body = {"method": "ale_load_weights", "kwargs": {"path": str(path)}}
        await self._ask("POST", "/collective_rpc", body)

    async def forget_caches(self) -> None:
        """Keys and values, those of requests under way too: they are computed again under the weights of now."""
        said = msgspec.json.decode(await self._ask("POST", "/reset_prefix_cache?reset_running_requests=true"))
        if not said.get("success"):
            raise ServerGone(f"{self.url} did not forget the keys and values of the old weights: {said}")

    async def label(self, version: str) -> None:
        """What the tokens sampled from now on are labelled with."""
        await self._ask("POST", "/update_weight_version", {"new_version": version})

    async def labelled(self) -> str:
        said = msgspec.json.decode(await self._ask("GET", "/weight_info"))
        return str(said.get("weight_version"))

    async def metrics(self) -> dict[str, float]:
        """Counters and gauges by name, without "vllm:"; those of several engines in one server are added up."""
        seen: dict[str, float] = {}
        for line in (await self._ask("GET", "/metrics")).decode().splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.removeprefix("vllm:").rpartition(" ")
                name = name.partition("{")[0]
                seen[name] = seen.get(name, 0.0) + float(value)
        return seen

    async def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            async with self._http.request(method, self.url + route, json=body) as response:
                await self._check(response, route)
                return await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{self.url}{route}: {type(error).__name__}: {error}") from error

    async def _check(self, response: aiohttp.ClientResponse, route: str) -> None:
        if response.status == 200:
            return
        said = (await response.text(errors="replace"))[:_SAID]
        if response.status >= 500:
            raise ServerGone(f"{self.url}{route}: HTTP {response.status}: {said}")
        cure = f"; a server for ale is started with: {HOW_TO_START}" if response.status in (403, 404, 405) else ""
        raise PolicyError(f"{self.url}{route}: HTTP {response.status}: {said}{cure}")


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events. Lines may be longer than what aiohttp reads at once."""
    rest = b""
    async for data in stream.iter_any():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield event[len(b"data: ") :]


def _piece(event: bytes) -> Piece | None:
    try:
        chunk = _chunks.decode(event)
    except msgspec.DecodeError as error:
        raise PolicyError(f"a vLLM server sent what is no piece of an answer ({error}): {event[:200]!r}") from error
    if chunk.error is not None:
        raise ServerGone(f"a vLLM server gave an answer up: {chunk.error.get('message')}")
    if not chunk.choices:
        return None
    choice = chunk.choices[0]
    tokens = choice.token_ids or []
    content = (choice.logprobs.content if choice.logprobs is not None else None) or []
    if [c.token_id for c in content] != tokens:
        raise PolicyError(f"{len(tokens)} tokens came with the log-probabilities of {len(content)}, or of others")
    logp = [float("nan") if c.logprob <= _NO_PROBABILITY else c.logprob for c in content]
    return Piece(tokens, logp, choice.finish_reason, choice.weight_versions)
