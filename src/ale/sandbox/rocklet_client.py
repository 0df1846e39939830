"""What can be asked of a rocklet, typed: commands, files, streams. Each wait has a deadline, each answer is checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.channel import GRACE_S, Channel
from ale.sandbox.frames import Frame, completed, file_info, os_error
from ale.sandbox.port import Completed, FileInfo
from ale.sandbox.rocklet.wire import (
    CONNECT,
    DATA,
    DONE,
    FAILED,
    LIST,
    LISTED,
    LISTEN,
    OK,
    PACK,
    PING,
    READ,
    RUN,
    STAT,
    TERMINAL,
    UNPACK,
    WRITE,
)
from ale.sandbox.stream import Stream

_FILE_S = 30.0


class OutOfMemory(SandboxError):
    """The kernel ended every process of the sandbox, which used more memory than it may: the command's own doing."""


class Life(Protocol):
    """The processes that a rocklet stands for."""

    async def end(self) -> None:
        """Kills every one and waits until the last is gone. Idempotent."""

    async def cause(self) -> SandboxError | None:
        """Why they ended by themselves, where that is known."""


class RockletClient:
    """After a SandboxError the rocklet is dead for good; nobody talks to it again."""

    def __init__(self, channel: Channel, life: Life) -> None:
        self.channel, self._life = channel, life

    async def run(
        self,
        argv: bytes,
        env: bytes,
        cwd: bytes,
        stdin: bytes,
        *,
        timeout_s: float,
        cpu_s: float | None,
        output_bytes: int,
        session: bytes | None = None,
    ) -> tuple[Completed, bytes]:
        """Runs a command, once; (how it ended, the session's state after it). `argv`, `env`: with NULs between.

        Past its time-out and a grace all processes are killed, which is reported as the time-out that it is; the next
        call raises SandboxError.
        """
        state = b"" if session is None else b"s" + session
        fields = (b"%f" % timeout_s, _cpu(cpu_s), output_bytes, cwd, stdin, state, argv, env)
        try:
            frame = await self._request(RUN, *fields, expected=DONE, deadline_s=timeout_s + GRACE_S)
        except DeadlineExceeded as error:
            await self._give_up(error)
            return Completed(signal=9, timed_out=True, duration_s=timeout_s + GRACE_S), b""
        with self._believing():
            if frame.kind == FAILED:
                raise SandboxError(f"the sandbox's agent lost a command: {os_error(frame, None).strerror}")
            return completed(frame, output_bytes), frame.fields[-1]

    async def ping(self, deadline_s: float) -> None:
        await self._file(PING, OK, None, deadline_s=deadline_s)

    async def read(self, path: bytes, max_bytes: int) -> bytes:
        (data,) = (await self._file(READ, DATA, path, path, max_bytes)).fields
        with self._believing():
            if len(data) > max_bytes:
                raise SandboxError(f"malformed frame: {len(data)} bytes where {max_bytes} were asked for")
        return data

    async def write(self, path: bytes, mode: int, data: bytes) -> None:
        await self._file(WRITE, OK, path, path, mode, data)

    async def list(self, path: bytes) -> tuple[FileInfo, ...]:
        frame = await self._file(LIST, LISTED, path, path)
        with self._believing():
            return tuple(map(file_info, frame.fields))

    async def stat(self, path: bytes) -> FileInfo:
        frame = await self._file(STAT, LISTED, path, path)
        with self._believing():
            (info,) = map(file_info, frame.fields)
        return info

    async def _file(
        self, kind: int, expected: int, path: bytes | None, *fields: bytes | int, deadline_s: float = _FILE_S
    ) -> Frame:
        try:
            frame = await self._request(kind, *fields, expected=expected, deadline_s=deadline_s)
        except DeadlineExceeded as error:
            await self._give_up(error)
            raise SandboxError(str(error)) from error
        if frame.kind == FAILED:
            with self._believing():
                failed = os_error(frame, None if path is None else os.fsdecode(path))
            raise failed
        return frame

    # -- streams

    async def pack(self, path: bytes) -> Stream:
        """A tree on its way out: read it to its end."""
        return await self._open(PACK, path, path=path)

    async def unpack(self, path: bytes, max_bytes: int) -> Stream:
        """A tree on its way in: write it, then `finish`."""
        return await self._open(UNPACK, path, max_bytes, path=path)

    async def terminal(
        self, argv: bytes, env: bytes, cwd: bytes, *, rows: int, columns: int, cpu_s: float | None
    ) -> Stream:
        return await self._open(TERMINAL, rows, columns, _cpu(cpu_s), cwd, argv, env)

    async def connect(self, address: bytes) -> Stream:
        return await self._open(CONNECT, address, half_closes=True)

    async def listen(self, address: bytes, on_incoming: Callable[[Stream], None]) -> Stream:
        return await self._open(LISTEN, address, on_incoming=on_incoming)

    async def _open(
        self,
        kind: int,
        *fields: bytes | int,
        path: bytes | None = None,
        half_closes: bool = False,
        on_incoming: Callable[[Stream], None] | None = None,
    ) -> Stream:
        try:
            return await self.channel.open_stream(
                kind,
                *fields,
                deadline_s=_FILE_S,
                half_closes=half_closes,
                path=None if path is None else os.fsdecode(path),
                on_incoming=on_incoming,
            )
        except SandboxError as error:
            if self.channel.broken and (cause := await self._life.cause()) is not None:
                raise cause from error
            raise  # or only the connection broke, and is being mended

    # -- failures

    async def _request(self, kind: int, *fields: bytes | int, expected: int, deadline_s: float) -> Frame:
        try:
            return await self.channel.request(kind, *fields, expected=expected, deadline_s=deadline_s)
        except SandboxError as error:
            if (cause := await self._life.cause()) is not None:
                raise cause from error
            raise

    @contextmanager
    def _believing(self) -> Iterator[None]:
        """Cuts a rocklet off whose answer cannot be."""
        try:
            yield
        except (SandboxError, ValueError) as error:
            lie = SandboxError(str(error))
            self.channel.fail(lie)
            raise lie from error

    async def _give_up(self, error: Exception) -> None:
        self.channel.fail(SandboxError(str(error)))
        await self._life.end()


def _cpu(cpu_s: float | None) -> bytes:
    return b"" if cpu_s is None else b"%d" % max(1, round(cpu_s))
