"""The channel: requests to one rocklet and its answers, over a connection that may break. The rocklet may lie.

A request is sent once per connection and done once in all: when a connection breaks, the next begins with the rocklet
saying which request it saw last. What it has seen is asked for, what it has not is sent; nothing else is repeated.
Streams end with their connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.frames import Decoder, Frame, number
from ale.sandbox.rocklet.wire import (
    ACK,
    ASK,
    CANCEL,
    FAILED,
    FIRST_INCOMING,
    INCOMING,
    MAX_INCOMING,
    OPENED,
    READY,
    RESET,
    pack,
)
from ale.sandbox.stream import Stream

# What the rocklet may add to a command's own time-out before the host takes over.
GRACE_S = 5.0
RECONNECT_S = 5.0
# Answers are acknowledged together, and with the next request: when they are so many, or at once when they take so much
# of the sandbox's memory.
_ACK_COUNT, _ACK_NOW_BYTES = 16, 65536
_CLOSED_STREAMS = 1024  # whose last frames may still be on their way

Reconnect = Callable[[], Awaitable[socket.socket]]


class Link(asyncio.Protocol):
    """One connection. It is up once the rocklet has said READY."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._decoder = Decoder()
        self.transport: asyncio.Transport | None = None
        self.up = False
        self.settled = asyncio.Event()  # up, or lost before that

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._channel.received(self, frame)
        except SandboxError as error:
            self._channel.fail(error)

    def connection_lost(self, _: Exception | None) -> None:
        self._channel.lost(self)


class _Asked:
    """A request whose answer is awaited."""

    def __init__(self, frame: bytes, expected: tuple[int, ...], stream: Stream | None = None) -> None:
        self.frame, self.expected, self.stream = frame, expected, stream
        self.answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    def expire(self, deadline_s: float) -> None:
        if not self.answer.done():
            self.answer.set_exception(DeadlineExceeded("an answer of the sandbox's agent", deadline_s))


class Channel:
    """`on_broken(gone)` is called once: when the rocklet has gone, or when it must go for what it sent or did not.

    `reconnect` makes another connection to the same rocklet, or raises SandboxError because that has ended.
    """

    def __init__(self, on_broken: Callable[[bool], None], reconnect: Reconnect | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.reconnects = 0
        self._on_broken, self._reconnect = on_broken, reconnect
        self._link: Link | None = None
        self._asked: dict[int, _Asked] = {}
        self._owed: list[int] = []  # what is to be acknowledged
        self._owed_bytes = 0
        self._streams: dict[int, Stream] = {}
        self._listeners: dict[int, Callable[[Stream], None]] = {}
        self._closed: deque[int] = deque(maxlen=_CLOSED_STREAMS)
        self._unheard: list[int] = []  # streams whose opening was lost with its connection
        self._requests = 0
        self._broken: SandboxError | None = None
        self._mending: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, end: socket.socket, on_broken: Callable[[bool], None], reconnect: Reconnect | None = None
    ) -> Channel:
        channel = cls(on_broken, reconnect)
        await channel._connect(end)
        return channel

    async def _connect(self, end: socket.socket) -> Link:
        end.setblocking(False)
        link = self._link = Link(self)  # before it is made: its first frame may come at once
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=end)
        return link

    @property
    def broken(self) -> bool:
        return self._broken is not None

    # -- requests

    async def request(self, kind: int, *fields: bytes | int, expected: int, deadline_s: float) -> Frame:
        """Makes a request and waits for its answer, which is of kind `expected` or FAILED.

        Raises SandboxError when the sandbox breaks meanwhile, DeadlineExceeded (the sandbox is then in an unknown
        state: kill it) after `deadline_s`. A cancelled request is cancelled inside too before this returns.
        """
        number, asked = self._ask(kind, fields, (expected, FAILED), None)
        timer = self._loop.call_later(deadline_s, asked.expire, deadline_s)
        try:
            return await asked.answer  # `asyncio.wait` would be a tenth of what a command costs here
        except asyncio.CancelledError:
            asked.answer = self._loop.create_future()  # the one before was cancelled with its only waiter
            await self._cancel(number, asked)
            raise
        finally:
            timer.cancel()

    async def open_stream(
        self,
        kind: int,
        *fields: bytes | int,
        deadline_s: float,
        half_closes: bool = False,
        path: str | None = None,
        on_incoming: Callable[[Stream], None] | None = None,
    ) -> Stream:
        """Opens a stream. Raises OSError when the other side refuses, else as `request` does."""
        stream = Stream(self, self._requests + 1, half_closes=half_closes, path=path)
        number, asked = self._ask(kind, fields, (OPENED, FAILED), stream)
        self._streams[number] = stream
        if on_incoming is not None:
            self._listeners[number] = on_incoming
        try:
            done, _ = await asyncio.wait([asked.answer], timeout=deadline_s)
            if not done:
                raise DeadlineExceeded("the opening of a stream to the sandbox", deadline_s)
            frame = asked.answer.result()
            if frame.kind == FAILED:
                stream.received(frame)
                await stream.read(deadline_s)  # raises it
        except BaseException:
            self._asked.pop(number, None)
            stream.reset()
            self.settle(stream)
            raise
        return stream

    def _ask(
        self, kind: int, fields: tuple[bytes | int, ...], expected: tuple[int, ...], stream: Stream | None
    ) -> tuple[int, _Asked]:
        if self._broken is not None:
            raise SandboxError(str(self._broken))
        self._requests += 1
        number = self._requests
        asked = self._asked[number] = _Asked(pack(kind, number, *fields), expected, stream)
        self._write(asked.frame)
        return number, asked

    def post(self, kind: int, number: int, *fields: bytes | int) -> None:
        """Sends what is not answered; what a broken connection loses of it is lost."""
        self._write(pack(kind, number, *fields))

    def _write(self, frame: bytes) -> None:
        if self._link is not None and self._link.up and self._link.transport is not None:
            if len(self._owed) >= _ACK_COUNT or self._owed_bytes > _ACK_NOW_BYTES:
                frame = pack(ACK, 0, b" ".join([b"%d" % number for number in self._owed])) + frame
                self._owed, self._owed_bytes = [], 0
            self._link.transport.write(frame)

    async def _cancel(self, number: int, asked: _Asked) -> None:
        asked.cancelled = True
        try:
            if self._broken is None:
                self.post(CANCEL, number)
                await asyncio.wait([asked.answer], timeout=GRACE_S)
        finally:  # too late, or cancelled once more: no time for manners
            if not asked.answer.done():
                self.fail(SandboxError("a cancelled command did not end"))

    # -- answers

    def received(self, link: Link, frame: Frame) -> None:
        """Takes a frame. Raises SandboxError at what an honest rocklet would not send."""
        if link is not self._link or self._broken is not None:
            return
        if (frame.kind == READY) == link.up or (frame.kind == READY and frame.number != 0):
            raise SandboxError(f"malformed frame: kind {frame.kind} at the wrong time")
        if frame.kind == READY:
            self._up(link, number(frame.fields[0], 0, self._requests))
        elif frame.kind == INCOMING:
            self._incoming(frame)
        elif frame.number in self._asked:
            self._answered(frame)
        elif frame.number in self._streams:
            stream = self._streams[frame.number]
            stream.received(frame)
            self.settle(stream)
        elif frame.number not in self._closed:
            raise SandboxError(f"malformed frame: kind {frame.kind} about {frame.number}, of which nothing was asked")

    def _answered(self, frame: Frame) -> None:
        asked = self._asked[frame.number]
        if frame.kind not in asked.expected:
            raise SandboxError(f"malformed frame: kind {frame.kind} in answer to request {frame.number}")
        del self._asked[frame.number]
        self._owed.append(frame.number)
        self._owed_bytes += sum(map(len, frame.fields))
        if self._owed_bytes > _ACK_NOW_BYTES:
            self._write(b"")
        if not asked.answer.done():
            asked.answer.set_result(frame)

    def _incoming(self, frame: Frame) -> None:
        fresh = number(frame.fields[0], FIRST_INCOMING, 2 * FIRST_INCOMING - 1)
        accept = self._listeners.get(frame.number)
        if accept is None and frame.number in self._closed:
            self.post(RESET, fresh)
            return
        alive = sum(1 for other in self._streams if other >= FIRST_INCOMING)
        if accept is None or fresh in self._streams or alive >= MAX_INCOMING * max(1, len(self._listeners)):
            raise SandboxError(f"malformed frame: a connection to {frame.number} that cannot be")
        stream = self._streams[fresh] = Stream(self, fresh, half_closes=True)
        accept(stream)

    def settle(self, stream: Stream) -> None:
        """Forgets a stream that is over."""
        if stream.over and self._streams.pop(stream.number, None) is not None:
            self._listeners.pop(stream.number, None)
            self._closed.append(stream.number)

    # -- the connection

    def _up(self, link: Link, highest: int) -> None:
        link.up = True
        link.settled.set()
        for stream in self._unheard:
            self.post(RESET, stream)
        self._unheard.clear()
        for request, asked in list(self._asked.items()):
            self._write(pack(ASK, request) if request <= highest else asked.frame)
            if asked.cancelled:
                self.post(CANCEL, request)
        if not self.ready.done():
            self.ready.set_result(None)

    def lost(self, link: Link) -> None:
        if link is not self._link or self._broken is not None:
            return
        error = SandboxError("the connection to the sandbox's agent broke")
        for request, asked in list(self._asked.items()):
            if asked.stream is not None:
                del self._asked[request]
                self._unheard.append(request)
                asked.answer.set_exception(error)
                asked.answer.exception()
        for stream in list(self._streams.values()):
            if stream.number not in self._listeners:
                stream.fail(error)
                self.settle(stream)
        link.settled.set()
        if self._mending is not None and not self._mending.done():
            return  # which tries again
        if self._reconnect is None or not self.ready.done():
            self.fail(SandboxError("the sandbox's agent has ended"), gone=True)
        else:
            self._mending = asyncio.ensure_future(self._mend(self._reconnect))

    async def _mend(self, reconnect: Reconnect) -> None:
        """Connects until the rocklet answers. One that has ended is told by its door, when the kernel shuts that."""
        try:
            async with asyncio.timeout(RECONNECT_S):
                up = False
                while not up:
                    link = await self._connect(await reconnect())
                    await link.settled.wait()
                    up = link.up
                self.reconnects += 1
        except (SandboxError, OSError, TimeoutError):
            self.fail(SandboxError("the sandbox's agent has ended"), gone=True)

    def fail(self, error: SandboxError, *, gone: bool = False) -> None:
        """Declares the sandbox broken: every open request and stream gets the error, the connection is cut."""
        if self._broken is not None:
            return
        self._broken = error
        if self._mending is not None and self._mending is not asyncio.current_task():
            self._mending.cancel()
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(SandboxError(str(error)))
                asked.answer.exception()  # an answer that nobody waits for any more is not worth a warning
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()
        for stream in self._streams.values():
            stream.fail(SandboxError(str(error)))
        self._asked.clear()
        self._streams.clear()
        self._listeners.clear()
        if self._link is not None and self._link.transport is not None:
            self._link.transport.abort()
        self._on_broken(gone)
