"""The proxy, listening: on a unix socket (for sandboxes without a network), on a loopback port, or on both.

async with open_proxy(train_mode(policy, tokenizer), socket=path, port=0) as proxy:
    async with proxy.episode("g3/1") as episode:
        ... OPENAI_BASE_URL=proxy.url/v1, OPENAI_API_KEY=episode.key ...
"""

from __future__ import annotations

import asyncio
import os
import socket as sockets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from ale.errors import DeadlineExceeded
from ale.messages import Sampling
from ale.policy.port import Policy
from ale.proxy.app import App, Mode
from ale.proxy.episode import Episode, Limits
from ale.proxy.journal import Journal
from ale.proxy.native import Native
from ale.proxy.speech import Speech, ToolSyntax
from ale.proxy.template import ChatTemplate
from ale.proxy.train import Train
from ale.proxy.turnstile import Turnstile

_START_S, _STOP_S = 30.0, 5.0
_BACKLOG = 2048


class Proxy:
    """`url` and `socket` say where it listens, None where it does not. Many episodes are open at once."""

    def __init__(self, mode: Mode, model: str) -> None:
        self.url: str | None = None
        self.socket: Path | None = None
        self._mode = mode
        self._open: dict[str, Episode] = {}
        self.app = App(mode, self._open.get, model)

    @asynccontextmanager
    async def episode(
        self,
        id: str,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        pinned: bool = False,
        journal: Path | None = None,
    ) -> AsyncIterator[Episode]:
        """Opens an episode; leaving ends it: its key opens nothing more, and requests under way are cancelled."""
        written = None if journal is None else Journal(journal)
        episode = Episode(
            id,
            limits=limits or Limits(),
            sampling=sampling or Sampling(),
            pinned=pinned,
            tree=self._mode.tree(),
            journal=written,
        )
        self._open[episode.key] = episode
        try:
            yield episode
        finally:
            del self._open[episode.key]
            episode.end("it was closed")
            running = tuple(episode.running)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._mode.end(episode)
            if written is not None:
                written.close()


def train_mode(
    policy: Policy,
    tokenizer: Any,
    *,
    places: int = 64,
    tool_syntax: ToolSyntax | None = None,
    turn_deadline_s: float = 600.0,
) -> Train:
    """Answers from `policy`, by the chat template of `tokenizer`. `places` requests are at the engine at once.

    `tool_syntax` None: as the chat template writes calls, else a bash fence. Raises `ModelError`.
    """
    template = ChatTemplate(tokenizer)
    syntax = tool_syntax or ("tags" if template.calls_in_tags else "fence")
    speech = Speech(syntax, thinks=template.thinks, opens_thought=template.opens_thought)
    return Train(Native(policy, template, speech, Turnstile(places), turn_deadline_s=turn_deadline_s))


@asynccontextmanager
async def open_proxy(
    mode: Mode, *, socket: Path | None = None, port: int | None = None, model: str = "policy"
) -> AsyncIterator[Proxy]:
    """Listens until it is left. `port` 0: any free one, on 127.0.0.1. `socket` is made with mode 0600 and removed."""
    if socket is None and port is None:
        raise ValueError("open_proxy needs a socket, a port, or both")
    proxy = Proxy(mode, model)
    listening: list[sockets.socket] = []
    try:
        if socket is not None:
            listening.append(_unix(socket))
            proxy.socket = socket
        if port is not None:
            listening.append(_loopback(port))
            proxy.url = f"http://127.0.0.1:{listening[-1].getsockname()[1]}"
        async with _serving(proxy.app, listening):
            yield proxy
    finally:
        for one in listening:
            one.close()
        if proxy.socket is not None:
            proxy.socket.unlink(missing_ok=True)


def _unix(path: Path) -> sockets.socket:
    one = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        old = os.umask(0o177)
        try:
            one.bind(str(path))
        finally:
            os.umask(old)
        one.listen(_BACKLOG)
    except BaseException:
        one.close()
        raise
    return one


def _loopback(port: int) -> sockets.socket:
    one = sockets.create_server(("127.0.0.1", port), backlog=_BACKLOG)
    one.setblocking(False)
    return one


class _Server(uvicorn.Server):
    """Says when it is up, and leaves signals to whoever runs the loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _serving(app: App, listening: list[sockets.socket]) -> AsyncIterator[None]:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(_STOP_S),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(listening), name="the proxy's server")
    up = asyncio.create_task(server.up.wait(), name="the proxy is up")
    try:
        await asyncio.wait({serving, up}, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        if not up.done():
            raise DeadlineExceeded("the start of the proxy", _START_S)
        yield
    finally:
        up.cancel()
        server.should_exit = True
        await asyncio.wait({serving}, timeout=2 * _STOP_S)
        serving.cancel()
        await asyncio.gather(serving, up, return_exceptions=True)
