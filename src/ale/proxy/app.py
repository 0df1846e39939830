"""The proxy as an ASGI application: key, path, body in; one of the modes answers; a client that leaves ends the work.

A mode gets the `Call` and the episode that its key names, and writes into `Out`. Everything that a client may do
wrong ends as a `Refusal` in the official shape of the API that it spoke to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import orjson

from ale.proxy.dialogue import Refusal
from ale.proxy.episode import Episode
from ale.proxy.journal import Exchange
from ale.proxy.tree import TokenTree

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 16 * 1024 * 1024
_BODY_S = 30.0
_WRITE_S = 60.0  # a reader that takes nothing for so long has gone

JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
PATHS = {
    "/v1/chat/completions": "openai",
    "/v1/completions": "openai",
    "/v1/responses": "openai",
    "/v1/messages": "anthropic",
}


class ReaderGone(ConnectionError):
    """The client takes nothing any more."""


class Call:
    """One request: its path, its body, and of its headers those that a mode may pass on."""

    __slots__ = ("body", "headers", "path")

    def __init__(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.path = path
        self.body = body
        self.headers = headers

    @property
    def api(self) -> str:
        return PATHS[self.path]


class Mode(Protocol):
    """How requests are answered: by the run's policy, by another server, or from a record."""

    def tree(self) -> TokenTree | None:
        """The record of a new episode; None where no tokens are seen."""

    async def respond(self, episode: Episode, call: Call, out: Out) -> None:
        """Answers one request. Raises `Refusal`."""

    async def end(self, episode: Episode) -> None:
        """The episode is over: what was held for it may go."""


class Out:
    """The answer to one request. Every write has a deadline; `pieces` keeps what left when `keep` says so."""

    def __init__(self, send: Send, *, keep: bool) -> None:
        self._send = send
        self._keep = keep
        self.status = 0
        self.content_type = JSON
        self.pieces: list[bytes] = []

    async def start(self, status: int, content_type: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.status, self.content_type = status, content_type
        head = [(b"content-type", content_type.encode()), *headers]
        await self._timed({"type": "http.response.start", "status": status, "headers": head})

    async def write(self, data: bytes) -> None:
        if data:
            if self._keep:
                self.pieces.append(data)
            await self._timed({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._timed({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status: int, body: bytes, *headers: tuple[bytes, bytes], content_type: str = JSON) -> None:
        """A complete answer at once."""
        self.status, self.content_type = status, content_type
        if self._keep:
            self.pieces.append(body)
        head = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body)), *headers]
        await self._timed({"type": "http.response.start", "status": status, "headers": head})
        await self._timed({"type": "http.response.body", "body": body, "more_body": False})

    async def _timed(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(_WRITE_S):
                await self._send(message)
        except TimeoutError as error:
            raise ReaderGone(f"nothing was read for {_WRITE_S:g} s") from error


class App:
    """`find` gives the open episode of a key, or None. `model` is the one name that `GET /v1/models` lists."""

    def __init__(self, mode: Mode, find: Callable[[str], Episode | None], model: str) -> None:
        self._mode = mode
        self._find = find
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":  # there are no web sockets here, and nothing to start
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        api = "anthropic" if path.startswith("/v1/messages") or "anthropic-version" in headers else "openai"
        out = Out(send, keep=False)
        try:
            episode = self._episode(headers)
            if path == "/v1/models" or path.startswith("/v1/models/"):
                _only(scope["method"], "GET")
                return await out.whole(200, self._models(path, api))
            if path not in PATHS:
                raise Refusal(404, f"there is no {path} here; there are {', '.join([*PATHS, '/v1/models'])}")
            _only(scope["method"], "POST")
            body = await _body(receive, headers)
        except Refusal as refusal:
            # The rest of a body that was not read must not be taken for the next request.
            return await out.whole(refusal.status, error_body(api, refusal), (b"connection", b"close"))
        if body is not None:
            await self._serve(episode, Call(path, body, headers), receive, send)
        return None

    def _episode(self, headers: dict[str, str]) -> Episode:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        if not key:
            raise Refusal(401, "no API key was sent: use `Authorization: Bearer KEY`", kind="authentication_error")
        episode = self._find(key.strip())
        if episode is None:
            raise Refusal(
                401,
                "incorrect API key: it is that of no open episode",
                kind="authentication_error",
                code="invalid_api_key",
            )
        return episode

    async def _serve(self, episode: Episode, call: Call, receive: Receive, send: Send) -> None:
        """The mode's work, until it is done or the client has gone."""
        out = Out(send, keep=episode.journal is not None)
        work = asyncio.ensure_future(self._respond(episode, call, out))
        gone = asyncio.ensure_future(receive())  # after the body, all that can come is the disconnect
        episode.running.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            episode.running.discard(work)
        if not work.cancelled():
            work.result()
        elif episode.over_because is not None and not out.status:  # it was closed meanwhile
            await self._refuse(episode, call, out, episode.refusal())

    async def _respond(self, episode: Episode, call: Call, out: Out) -> None:
        try:
            episode.admit()
            await self._mode.respond(episode, call, out)
        except Refusal as refusal:
            await self._refuse(episode, call, out, refusal)
        except ConnectionError as error:
            logger.info("the client of %s reads no more: %s", episode.id, error)
        except Exception:
            logger.exception("%s: %s failed", episode.id, call.path)
            await self._refuse(episode, call, out, Refusal(500, "the proxy failed; see its log", kind="server_error"))
        finally:
            if episode.journal is not None and out.status:
                pieces = [piece.decode() for piece in out.pieces]
                request = call.body.decode("utf-8", "replace")
                episode.journal.keep(Exchange(call.path, request, out.status, out.content_type, pieces))

    @staticmethod
    async def _refuse(episode: Episode, call: Call, out: Out, refusal: Refusal) -> None:
        episode.usage.refused += 1
        body = error_body(call.api, refusal)
        if not out.status:
            retry = ((b"retry-after", b"1"),) if refusal.status == 429 else ()
            if refusal.status == 403:
                retry = ((b"x-should-retry", b"false"),)
            await out.whole(refusal.status, body, *retry)
        else:  # the stream has begun: its last event tells
            await out.write((b"event: error\n" if call.api == "anthropic" else b"") + b"data: " + body + b"\n\n")
            await out.end()

    def _models(self, path: str, api: str) -> bytes:
        name = self._model
        model: dict[str, Any]
        if api == "anthropic":
            model = {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
            listed = {"data": [model], "has_more": False, "first_id": name, "last_id": name}
        else:
            model = {"id": name, "object": "model", "created": 0, "owned_by": "ale"}
            listed = {"object": "list", "data": [model]}
        if path == "/v1/models":
            return orjson.dumps(listed)
        if path.removeprefix("/v1/models/") != name:
            raise Refusal(404, f"there is no such model; there is {name}", code="model_not_found", param="model")
        return orjson.dumps(model)


def error_body(api: str, refusal: Refusal) -> bytes:
    """The provider's own shape of an error."""
    if api == "anthropic":
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
            503: "overloaded_error",
            504: "timeout_error",
        }
        kind = kinds.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": _printable(refusal.message)}})
    return orjson.dumps(
        {
            "error": {
                "message": _printable(refusal.message),
                "type": refusal.kind,
                "param": None if refusal.param is None else _printable(refusal.param),
                "code": refusal.code,
            }
        }
    )


def _printable(text: str) -> str:
    """A message may quote what a client sent, half of a surrogate pair included."""
    return text.encode("utf-8", "replace").decode()


def _only(method: str, allowed: str) -> None:
    if method != allowed:
        raise Refusal(405, f"use {allowed} here, not {method}")


async def _body(receive: Receive, headers: dict[str, str]) -> bytes | None:
    """The whole body; None when the client left before its end. Raises `Refusal`."""
    too_large = Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {_BODY_S:g} s") from error
