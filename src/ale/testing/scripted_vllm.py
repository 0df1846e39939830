"""A vLLM server without a model, over real HTTP: the routes that `ale.policy.vllm_client` uses, predictable tokens.

The token at position p of a sequence is `token_at(p)`, whatever came before it, with the log-probability
`logp_at(weights, p)`: a turn that was broken off and taken up again has to look like one that was not. The weights are
a number, that in the file `weights` of the directory that was loaded last.

async with ScriptedVllm() as server: VllmClient(server.url)
python -m ale.testing.scripted_vllm --uds SOCKET      the same as a process; other arguments are taken and ignored
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

_FOREVER = 1 << 60


def token_at(position: int) -> int:
    return 100 + position % 800


def logp_at(weights: int, position: int) -> float:
    """Exact in float32, and tells its place."""
    return -(weights + 1) - (position % 256) / 256


def write_weights(path: Path, number: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text(str(number))


class ScriptedVllm:
    """`tokens` bounds what it will sample before `allow` is called for more; None: no bound. `calls` are the routes in
    order, `requests` the bodies of what was to be generated, `dropped` how many answers their clients did not wait for.
    """

    def __init__(self, *, tokens: int | None = None, labels: bool = True) -> None:
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.dropped = 0
        self.fail: dict[str, int] = {}
        """HTTP statuses to answer with, by route."""
        self.weights = 0
        self.label = "default"
        self.running = 0
        self._labels = labels
        self._left = _FOREVER if tokens is None else tokens
        self._paused = False
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> ScriptedVllm:
        await self.listen()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def listen(self, *, uds: Path | None = None, port: int = 0) -> None:
        """On loopback, or on a unix socket."""
        app = web.Application(middlewares=[self._record])
        app.router.add_get("/health", self._nothing)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/allow", self._allow)
        for route in ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"):
            app.router.add_post(route, getattr(self, "_" + route[1:]))
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        if uds is not None:
            await web.UnixSite(self._runner, str(uds)).start()
            return
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        assert site._server is not None
        self.port: int = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        """As a server that dies: answers under way break off."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def allow(self, tokens: int) -> None:
        self._left += tokens
        self._tell()

    async def until(self, requests: int) -> None:
        """Until so many answers are under way and nothing more can be sampled."""
        while self.running < requests or self._left:
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls.append(request.path)
        if status := self.fail.get(request.path):
            return web.json_response({"error": {"message": "as the script says"}}, status=status)
        response: web.StreamResponse = await handler(request)
        return response

    async def _nothing(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _metrics(self, request: web.Request) -> web.Response:
        said = (
            f'vllm:num_requests_running{{engine="0",model_name="m"}} {self.running}.0',
            'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25',
            'vllm:prompt_tokens_total{engine="0",model_name="m"} 30.0',
            'vllm:prefix_cache_hits_total{engine="0",model_name="m"} 10.0',
        )
        return web.Response(text="# HELP of a counter\n" + "\n".join(said) + "\n")

    async def _allow(self, request: web.Request) -> web.Response:
        self.allow(int(request.query["tokens"]))
        return web.json_response({})

    async def _weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _pause(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "keep"
        self._paused = True
        return web.json_response({})

    async def _resume(self, request: web.Request) -> web.Response:
        self._paused = False
        self._tell()
        return web.json_response({})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert self._paused
        assert body["method"] == "ale_load_weights"
        file = Path(body["kwargs"]["path"]) / "weights"
        self.weights = int(file.read_text()) if file.exists() else 0
        return web.json_response({"results": [None]})

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        return web.json_response({"success": request.query["reset_running_requests"] == "true"})

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        self._tell()
        try:
            await self._answer(body, response)
        except (ConnectionError, asyncio.CancelledError):
            self.dropped += 1
            raise
        finally:
            self.running -= 1
            self._tell()
        return response

    async def _answer(self, body: dict[str, Any], response: web.StreamResponse) -> None:
        asked = body["sampling_params"]
        start, spans = len(body["token_ids"]), list[dict[str, Any]]()
        for n in range(asked["max_tokens"]):
            while self._paused or not self._left:
                await self._changed.wait()
            self._left -= 1
            self._tell()
            token, logp = token_at(start + n), logp_at(self.weights, start + n)
            if not spans or spans[-1]["version"] != self.label:
                spans.append({"version": self.label, "start": n, "end": n})
            spans[-1]["end"] = n + 1
            stopped = token in asked["stop_token_ids"]
            finish = "stop" if stopped else "length" if n + 1 == asked["max_tokens"] else None
            choice = {
                "index": 0,
                "token_ids": [token],
                "logprobs": {"content": [{"token_id": token, "logprob": logp, "rank": 1, "top_logprobs": []}]},
                "finish_reason": finish,
                "weight_versions": spans if finish and self._labels else None,
            }
            await response.write(f"data: {json.dumps({'request_id': 'r', 'choices': [choice]})}\n\n".encode())
            await asyncio.sleep(0)
            if finish:
                break
        await response.write(b"data: [DONE]\n\n")


async def _serve(uds: Path, tokens: int | None) -> None:
    server = ScriptedVllm(tokens=tokens)
    await server.listen(uds=uds)
    await asyncio.Event().wait()


if __name__ == "__main__":
    arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    socket = Path(arguments["--uds"])
    socket.unlink(missing_ok=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(socket, int(arguments["--tokens"]) if "--tokens" in arguments else None))
