"""The proxy, listening: on a unix socket (for sandboxes without a network), on a loopback port, or on both.

async with open_proxy(train_mode(policy, tokenizer), socket=path, port=0) as proxy:
    async with proxy.episode("g3/1") as episode:
        ... OPENAI_BASE_URL=proxy.url/v1, OPENAI_API_KEY=episode.key ...
"""

from __future__ import annotations

import asyncio
import os
import socket as sockets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

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
from ale.serving import BACKLOG, listening, serving


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
    tool_syntax: ToolSyntax | Literal["template"] = "template",
    turn_deadline_s: float = 600.0,
) -> Train:
    """Answers from `policy`, by the chat template of `tokenizer`. `places` requests are at the engine at once.

    `tool_syntax` is what `syntax_of` takes. Raises `ModelError`.
    """
    template = ChatTemplate(tokenizer)
    syntax = syntax_of(template, tool_syntax)
    speech = Speech(syntax, thinks=template.thinks, opens_thought=template.opens_thought)
    return Train(Native(policy, template, speech, Turnstile(places), turn_deadline_s=turn_deadline_s))


def syntax_of(template: ChatTemplate, wanted: ToolSyntax | Literal["template"]) -> ToolSyntax:
    """How calls are written; "template": as the chat template does, and in a bash fence where it knows none."""
    if wanted != "template":
        return wanted
    return "tags" if template.calls_in_tags else "fence"


@asynccontextmanager
async def open_proxy(
    mode: Mode, *, socket: Path | None = None, port: int | None = None, model: str = "policy"
) -> AsyncIterator[Proxy]:
    """Listens until it is left. `port` 0: any free one, on 127.0.0.1. `socket` is made with mode 0600 and removed."""
    if socket is None and port is None:
        raise ValueError("open_proxy needs a socket, a port, or both")
    proxy = Proxy(mode, model)
    listeners: list[sockets.socket] = []
    try:
        if socket is not None:
            listeners.append(_unix(socket))
            proxy.socket = socket
        if port is not None:
            listeners.append(listening("127.0.0.1", port))
            proxy.url = f"http://127.0.0.1:{listeners[-1].getsockname()[1]}"
        async with serving(proxy.app, listeners, "the proxy"):
            yield proxy
    finally:
        for one in listeners:
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
        one.listen(BACKLOG)
    except BaseException:
        one.close()
        raise
    return one
