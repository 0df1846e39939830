"""The engine's end of a stream: pieces in and out under credit, every wait under a deadline. The other end may lie."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.frames import Frame, number, os_error, status
from ale.sandbox.rocklet.wire import CREDIT, END, FAILED, OK, PIECE, PIECE_BYTES, RESET, WINDOW

if TYPE_CHECKING:
    from ale.sandbox.channel import Channel


class Stream:
    """One reader and one writer at a time. `half_closes`: each side ends for itself; else the other's end is the end.

    Raises OSError when the other side failed or gave up, SandboxError when the sandbox or the connection broke.
    """

    def __init__(self, channel: Channel, number: int, *, half_closes: bool = False, path: str | None = None) -> None:
        self.number = number
        self.status: int | None = None
        """Exit status of a terminal's command, once it has ended."""
        self._channel, self._half_closes, self._path = channel, half_closes, path
        self._pieces: deque[bytes] = deque()
        self._allowance = WINDOW  # what the other side may still send
        self._credit = WINDOW  # what this side may still send
        self._ended = self._peer_ended = self._ok = False
        self._error: Exception | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether nothing honest can come any more."""
        if self._error is not None or self._ok:
            return True
        return self._peer_ended and (self._ended or not self._half_closes)

    def received(self, frame: Frame) -> None:
        """Takes a frame of this stream. Raises SandboxError at what an honest side would not send."""
        if self.over or (self._peer_ended and frame.kind in (PIECE, END)):
            raise SandboxError(f"malformed frame: kind {frame.kind} on a stream that has ended")
        if frame.kind == PIECE:
            size = len(frame.fields[0])
            if not 0 < size <= self._allowance:
                raise SandboxError(f"malformed frame: a piece of {size} bytes where {self._allowance} were allowed")
            self._allowance -= size
            self._pieces.append(frame.fields[0])
        elif frame.kind == CREDIT:
            self._credit += number(frame.fields[0], 1, WINDOW - self._credit)
            self._writable.set()
        elif frame.kind == END:
            if frame.fields[0]:
                self.status = status(frame.fields[0])
            self._peer_ended = True
        elif frame.kind == OK:
            self._ok = True
        elif frame.kind == FAILED:
            self.fail(os_error(frame, self._path))
        elif frame.kind == RESET:
            self.fail(ConnectionResetError(104, "the other side gave up the connection"))
        else:
            raise SandboxError(f"malformed frame: kind {frame.kind} on a stream")
        self._readable.set()

    def fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._readable.set()
        self._writable.set()

    async def read(self, deadline_s: float | None) -> bytes:
        """What has come, at least a byte; b"" at the end. None: waits as long as the sandbox lives."""
        while not self._pieces and not self._peer_ended:
            if self._error is not None:
                raise self._error
            self._readable.clear()
            await self._wait(self._readable, "bytes from a stream of the sandbox", deadline_s)
        data = b"".join(self._pieces)
        self._pieces.clear()
        if data and not self._peer_ended and self._error is None:
            self._allowance += len(data)
            self._channel.post(CREDIT, self.number, len(data))
        return data

    async def write(self, data: bytes, deadline_s: float | None) -> None:
        view = memoryview(data)
        while view:
            if self._error is not None:
                raise self._error
            if not self._credit:
                self._writable.clear()
                await self._wait(self._writable, "room in a stream of the sandbox", deadline_s)
                continue
            piece = bytes(view[: min(PIECE_BYTES, self._credit)])
            view = view[len(piece) :]
            self._credit -= len(piece)
            self._channel.post(PIECE, self.number, piece)

    def end(self) -> None:
        """No more pieces from this side."""
        if not self._ended and self._error is None:
            self._ended = True
            self._channel.post(END, self.number, b"")
            self._channel.settle(self)

    async def finish(self, deadline_s: float) -> None:
        """Ends this side and waits until the other says that it has taken everything."""
        self.end()
        while not self._ok:
            if self._error is not None:
                raise self._error
            self._readable.clear()
            await self._wait(self._readable, "the end of a stream to the sandbox", deadline_s)

    def resize(self, kind: int, *fields: int) -> None:
        if not self.over:
            self._channel.post(kind, self.number, *fields)

    def reset(self) -> None:
        """Gives the stream up. Idempotent; nothing is heard of it any more."""
        if not self.over:
            self._channel.post(RESET, self.number)
            self.fail(ConnectionResetError(104, "the stream was given up"))
            self._channel.settle(self)

    @staticmethod
    async def _wait(event: asyncio.Event, what: str, deadline_s: float | None) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await event.wait()
        except TimeoutError as error:
            assert deadline_s is not None
            raise DeadlineExceeded(what, deadline_s) from error
