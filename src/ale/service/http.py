"""HTTP around operations: token, key, body in; JSON out; every failure in one shape with the status that it means.

An `Operation` is a line of the table that routes and OpenAPI document are made from. One that changes something goes
through its tenant's ledger, under the key that the client gave.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ale.errors import DeadlineExceeded
from ale.sandbox.wire import (
    KEY,
    KEY_HEADER,
    Malformed,
    Problem,
    Refused,
    Running,
    TooLarge,
    Unauthorized,
    UnknownName,
    printable,
    problem,
)
from ale.service.ledger import Answer
from ale.service.room import Taken
from ale.service.tenant import Tenant

logger = logging.getLogger(__name__)

MAX_WAIT_S = 60.0
_WAIT_S = 30.0
_DRAIN_BYTES, _DRAIN_S = 64 << 20, 10.0
_ROOM_S = 30.0  # how long a body waits for room: a client of ours takes a service that says nothing for 45 s for lost
_BODY_S = 60.0  # how long a body may stand still, or a small one take
JSON, BYTES = "application/json", "application/octet-stream"


class Call:
    """One request, its token known. `body` is what the operation's type says, or raw bytes, or None."""

    def __init__(self, tenant: Tenant, request: Request, body: Any) -> None:
        self.tenant, self.body = tenant, body
        self._request = request
        self.path: dict[str, str] = request.path_params
        # File names are bytes: what is no UTF-8 stays as it is.
        raw = request.scope["query_string"].decode("latin-1")
        self.query = dict(parse_qsl(raw, keep_blank_values=True, errors="surrogateescape", max_num_fields=16))

    def number(self, name: str, default: float | None, low: float, high: float) -> float:
        given = self.query.get(name)
        try:
            value = default if given is None else float(given)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN is nowhere
            got = printable(str(given))
            raise Malformed(f"query field {name}: expected a number in {low:g}..{high:g}, got {got!r}")
        return value

    def integer(self, name: str, default: int | None, high: int) -> int:
        given = self.query.get(name, str(default))
        if not re.fullmatch(r"\d{1,19}", given, re.ASCII) or int(given) > high:
            raise Malformed(f"query field {name}: expected a number in 0..{high}, got {printable(given)!r}")
        return int(given)

    def text(self, name: str) -> str:
        if not self.query.get(name):
            raise Malformed(f"query field {name} is missing")
        return str(self.query[name])

    async def drain(self) -> None:
        await drain(self._request)

    async def stream(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises DeadlineExceeded when it stands still, ClientDisconnect when it ends early."""
        stream = self._request.stream()
        while True:
            try:
                async with asyncio.timeout(_BODY_S):
                    piece = await anext(stream, None)
            except TimeoutError as error:
                raise DeadlineExceeded("the next part of a body", _BODY_S) from error
            if piece is None:
                return
            yield piece


Do = Callable[[Call], Awaitable[Any]]


class Tree:
    """As the type of a body: a tree, which `do` streams in or out."""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """`do` returns a struct, which becomes JSON, or a Response. `once`: it goes through the ledger."""

    method: str
    path: str
    summary: str
    do: Do
    body: Any = None
    """The type of the JSON body; bytes: raw; None: none; Tree: `do` streams it."""
    reply: Any
    """The type of the JSON answer; bytes: raw; Tree: `do` makes the Response."""
    query: tuple[str, ...] = ()
    once: bool = False


class Service:
    """The ASGI application of a table of operations. `tokens` are tenants' by token."""

    def __init__(self, tokens: Mapping[str, Tenant], operations: Sequence[Operation], document: bytes) -> None:
        self._tokens = [(_digest(token), tenant) for token, tenant in tokens.items()]
        self._document = document
        routes = [Route(one.path, self._endpoint(one), methods=[one.method]) for one in operations]
        routes.append(Route("/openapi.json", self._openapi, methods=["GET"]))
        self.asgi = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    def _tenant(self, request: Request) -> Tenant:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        presented = _digest(token.strip())
        found = None
        for digest, tenant in self._tokens:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            raise Unauthorized("send `Authorization: Bearer TOKEN` with a token of this service")
        return found

    def _endpoint(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            unread = not {"content-length", "transfer-encoding"}.isdisjoint(request.headers)
            room: Taken | None = None
            try:
                tenant = self._tenant(request)
                streamed = operation.body in (None, Tree)
                announced = 0 if streamed else _announced(request, tenant.limits.body_bytes)
                room = await tenant.bodies.take(announced, _ROOM_S)
                raw = b"" if streamed else await _body(request, tenant.limits.body_bytes)
                unread &= streamed
                call = Call(tenant, request, None if streamed else _decode(operation.body, raw))
                if operation.once:
                    return await self._once(operation, call, request, raw, room)
                answer = await operation.do(call)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except Exception as error:
                response = _failure(error, f"{operation.method} {operation.path}")
                if unread:  # the rest of a body must not be taken for the next request
                    response.headers["connection"] = "close"
                    await drain(request)
                return response
            finally:
                if room is not None and not room.lent:
                    room.release()
            return answer if isinstance(answer, Response) else _json(200, _encode(answer))

        return endpoint

    async def _once(self, operation: Operation, call: Call, request: Request, raw: bytes, room: Taken) -> Response:
        """`room`: what the body takes, until the work is over."""
        key = request.headers.get(KEY_HEADER) or secrets.token_hex(16)
        if not KEY.fullmatch(key):
            raise Malformed(f"header {KEY_HEADER}: it must match {KEY.pattern}")
        asked = sorted((name, value) for name, value in call.query.items() if name != "wait_s")  # how long is no part
        words = (operation.method, request.scope["path"], repr(asked))
        fingerprint = hashlib.sha256("\0".join(words).encode() + b"\0" + raw).digest()

        async def work() -> Answer:
            try:
                return 200, _encode(await operation.do(call))
            except Exception as error:
                return _answer(error, f"{operation.method} {operation.path}")

        wait_s = call.number("wait_s", _WAIT_S, 0.0, MAX_WAIT_S)
        begun = call.tenant.ledger.begin(key, fingerprint, work)
        if begun is not None:
            room.lend(begun)
        return answered(key, await call.tenant.ledger.answer(key, wait_s))

    async def _openapi(self, request: Request) -> Response:
        try:
            self._tenant(request)
        except Unauthorized as error:
            return _failure(error, "GET /openapi.json")
        return _json(200, self._document)


def answered(key: str, answer: Answer | None) -> Response:
    """The answer that the ledger has, or that there is none yet."""
    return _json(202, _encode(Running(running=key))) if answer is None else _json(*answer)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _json(status: int, body: bytes) -> Response:
    return Response(body, status_code=status, media_type=JSON)


def _encode(answer: Any) -> bytes:
    return msgspec.json.encode(answer)


def _failure(error: Exception, where: str) -> Response:
    status, body = _answer(error, where)
    response = _json(status, body)
    if status == 503:
        response.headers["retry-after"] = "1"
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def _answer(error: Exception, where: str) -> Answer:
    told = problem(error)
    if told is None:
        logger.error("%s failed", where, exc_info=error)
        told = 500, Problem(kind="ServiceError", message="the service failed; see its log")
    return told[0], _encode(Refused(error=told[1]))


async def _no_route(_: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a method that a path has not."""
    assert isinstance(error, HTTPException)
    kind = UnknownName if error.status_code == 404 else Malformed
    body = Refused(error=Problem(kind=kind.__name__, message=f"{error.detail}; /openapi.json has what there is"))
    return Response(_encode(body), error.status_code, headers=error.headers, media_type=JSON)


async def drain(request: Request) -> None:
    """Takes what still comes of a body that is refused: else the answer may be lost to a client that still writes."""
    left = _DRAIN_BYTES
    try:
        async with asyncio.timeout(_DRAIN_S):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: it was read to its end before
        return


def _announced(request: Request, limit: int) -> int:
    """The size of a body as its head says it, or the most that it may have. Raises TooLarge."""
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        return limit if "transfer-encoding" in request.headers else 0
    if int(length) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes")
    return int(length)


async def _body(request: Request, limit: int) -> bytes:
    too_large = TooLarge(f"the body is larger than {limit} bytes")
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise DeadlineExceeded("the rest of a body", _BODY_S) from error
    return b"".join(parts)


def _decode(kind: Any, raw: bytes) -> Any:
    if kind is bytes:
        return raw
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise Malformed(f"the body: {printable(str(error))}") from error
    except (UnicodeError, RecursionError) as error:
        raise Malformed(f"the body is no JSON that can be read: {error}") from error
