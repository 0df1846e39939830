"""The channel: requests to one rocklet and its answers, each awaited under a deadline. The rocklet may lie."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.frames import Decoder, Frame
from ale.sandbox.rocklet import CANCEL, READY, pack

# What the rocklet may add to a command's own time-out before the host takes over.
GRACE_S = 5.0


class Channel(asyncio.Protocol):
    """`on_broken(gone)` is called once: when the rocklet has gone, or when it must go for what it sent or did not."""

    def __init__(self, on_broken: Callable[[bool], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Frame] = loop.create_future()
        self._on_broken = on_broken
        self._decoder = Decoder()
        self._waiting: dict[int, asyncio.Future[Frame]] = {0: self.ready}
        self._requests = 0
        self._broken: SandboxError | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, end: socket.socket, on_broken: Callable[[bool], None]) -> Channel:
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(on_broken), sock=end)
        return channel

    async def request(self, kind: int, *fields: bytes | int, deadline_s: float) -> Frame:
        """Sends a request once and waits for its answer.

        Raises SandboxError when the sandbox breaks meanwhile, DeadlineExceeded (the sandbox is then in an unknown
        state: kill it) after `deadline_s`. A cancelled request is cancelled inside too before this returns.
        """
        if self._broken is not None or self._transport is None:
            raise SandboxError(str(self._broken or "the sandbox is not connected"))
        self._requests += 1
        number = self._requests
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._transport.write(pack(kind, number, *fields))
        try:
            done, _ = await asyncio.wait([answer], timeout=deadline_s)
        except asyncio.CancelledError:
            await self._cancel(number, answer)
            raise
        if not done:
            raise DeadlineExceeded("an answer of the sandbox's agent", deadline_s)
        return answer.result()

    async def _cancel(self, number: int, answer: asyncio.Future[Frame]) -> None:
        try:
            if self._broken is None and self._transport is not None:
                self._transport.write(pack(CANCEL, number))
                await asyncio.wait([answer], timeout=GRACE_S)
        finally:  # too late, or cancelled once more: no time for manners
            if not answer.done():
                self.fail(SandboxError("a cancelled command did not end"))

    def fail(self, error: SandboxError, *, gone: bool = False) -> None:
        """Declares the sandbox broken: every open request gets the error, the connection is cut."""
        if self._broken is not None:
            return
        self._broken = error
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(SandboxError(str(error)))
                answer.exception()  # an answer that nobody waits for any more is not worth a warning
        self._waiting.clear()
        if self._transport is not None:
            self._transport.abort()
        self._on_broken(gone)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._decoder.feed(data)
            for frame in frames:
                if frame.request not in self._waiting or (frame.kind == READY) != (frame.request == 0):
                    raise SandboxError(f"malformed frame: kind {frame.kind} in answer to request {frame.request}")
                answer = self._waiting.pop(frame.request)
                if not answer.done():
                    answer.set_result(frame)
        except SandboxError as error:
            self.fail(error)

    def connection_lost(self, _: Exception | None) -> None:
        self.fail(SandboxError("the sandbox's agent has ended"), gone=True)
