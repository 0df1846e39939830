"""A namespace: one incarnation of a sandbox, from the start of its rocklet to the death of its last process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.channel import GRACE_S, Channel
from ale.sandbox.frames import Frame, completed
from ale.sandbox.launcher_client import Launched, LauncherClient
from ale.sandbox.port import Completed
from ale.sandbox.rocklet import DATA, DONE, FAILED, READ, READY, RUN, WRITE, WROTE

_START_S = 30.0
_FILE_S = 30.0
_DYING_S = 1.0
_SAID_BYTES = 2000  # of what bwrap and the rocklet print when they fail


class OutOfMemory(SandboxError):
    """The kernel ended every process of the sandbox, which used more memory than it may: the command's own doing."""


class Namespace:
    """The processes of a sandbox. After a SandboxError it is dead for good; the host never talks to it again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._launched: Launched | None = None
        self._channel: Channel | None = None
        self._stderr = -1
        self.handed_over: list[int] = []
        """Descriptors that the gate inside handed out: the egress proxy's listener, if any, and the watch."""

    async def start(self, client: LauncherClient, argv: Sequence[str], limits: Mapping[str, int | str]) -> None:
        """Starts bwrap and waits for the gate and the rocklet. Whatever happens, `end()` must follow."""
        gate, inner_gate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with gate, inner_gate:
            gate.setblocking(False)
            await self._start(client, argv, limits, inner_gate)
            _, ancillary, _, _ = gate.recvmsg(1, socket.CMSG_SPACE(2 * 4), socket.MSG_CMSG_CLOEXEC)
            self.handed_over = [fd for _, _, packed in ancillary for fd in memoryview(packed).cast("i")]

    async def _start(
        self, client: LauncherClient, argv: Sequence[str], limits: Mapping[str, int | str], gate: socket.socket
    ) -> None:
        # Not a pipe: nobody has to read it, and what a failed start says is still there afterwards.
        self._stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                stdio = (theirs.fileno(), self._stderr, self._stderr, gate.fileno())
                self._launched = await client.spawn(self.name, argv, stdio=stdio, limits=limits)
            self._channel = await Channel.open(ours, self._on_broken)
        except BaseException:
            if self._channel is None:
                ours.close()
            raise
        channel, launched = self._channel, self._launched
        first: list[asyncio.Future[Any]] = [channel.ready, launched.ended]
        await asyncio.wait(first, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        if not channel.ready.done():
            cause = SandboxError("it did not start in time")
            channel.fail(cause)
        with contextlib.suppress(SandboxError):
            if channel.ready.result().kind == READY:
                return
        await launched.kill()  # when the launcher could not even start bwrap, this says why
        said = os.pread(self._stderr, _SAID_BYTES, 0).decode("utf-8", "replace").strip()
        raise SandboxError(f"it did not start: {said or 'no reason given'}")

    def _on_broken(self, gone: bool) -> None:
        if self._launched is None:
            return
        if gone:  # what ended process 1 is told by its end, unless a kill comes first
            asyncio.get_running_loop().call_later(_DYING_S, self._launched.kill_soon)
        else:
            self._launched.kill_soon()

    async def run(
        self,
        argv: Sequence[bytes],
        env: Sequence[bytes],
        cwd: bytes,
        stdin: bytes,
        *,
        timeout_s: float,
        cpu_s: float | None,
        output_bytes: int,
    ) -> Completed:
        """Runs a command, once. Past its time-out and a grace the whole namespace is killed, which is reported as
        the time-out that it is; the next call raises SandboxError."""
        cpu = b"%d" % max(1, round(cpu_s)) if cpu_s is not None else b""
        fields: tuple[bytes | int, ...] = (b"%f" % timeout_s, cpu, output_bytes, cwd, stdin, len(argv), *argv, *env)
        try:
            frame = await self._request(RUN, *fields, deadline_s=timeout_s + GRACE_S)
        except DeadlineExceeded as error:
            await self._give_up(error)
            return Completed(signal=9, timed_out=True, duration_s=timeout_s + GRACE_S)
        if frame.kind != DONE:
            raise await self._lied(f"kind {frame.kind} in answer to a command")
        try:
            return completed(frame, output_bytes)
        except SandboxError as error:
            raise await self._lied(str(error)) from error

    async def read(self, path: bytes, max_bytes: int) -> bytes:
        fields = await self._file(READ, DATA, path, path, max_bytes)
        if len(fields[0]) > max_bytes:
            raise await self._lied(f"{len(fields[0])} bytes where {max_bytes} were asked for")
        return fields[0]

    async def write(self, path: bytes, mode: int, data: bytes) -> None:
        await self._file(WRITE, WROTE, path, path, mode, data)

    async def _file(self, kind: int, expected: int, path: bytes, *fields: bytes | int) -> list[bytes]:
        try:
            frame = await self._request(kind, *fields, deadline_s=_FILE_S)
        except DeadlineExceeded as error:
            await self._give_up(error)
            raise SandboxError(str(error)) from error
        if frame.kind == FAILED:
            number, reason = frame.fields
            if not number.isdigit() or len(number) > 3:
                raise await self._lied(f"error number {number[:20]!r}")
            raise OSError(int(number), reason[:_SAID_BYTES].decode("utf-8", "replace"), os.fsdecode(path))
        if frame.kind != expected:
            raise await self._lied(f"kind {frame.kind} in answer to a file request")
        return frame.fields

    async def _request(self, kind: int, *fields: bytes | int, deadline_s: float) -> Frame:
        assert self._channel is not None
        assert self._launched is not None
        try:
            return await self._channel.request(kind, *fields, deadline_s=deadline_s)
        except SandboxError as error:
            ended = await self._launched.end(_DYING_S)
            if ended.out_of_memory:
                raise OutOfMemory("it used more memory than it may, files included") from error
            raise

    async def _give_up(self, error: Exception) -> None:
        if self._channel is not None:
            self._channel.fail(SandboxError(str(error)))
        await self.end()

    async def _lied(self, what: str) -> SandboxError:
        error = SandboxError(f"malformed frame: {what}")
        await self._give_up(error)
        return error

    def end_soon(self, error: SandboxError) -> None:
        """Fails what is running and asks for the kill, where nothing can be awaited; `end()` must still follow."""
        if self._channel is not None:
            self._channel.fail(error)
        if self._launched is not None:
            self._launched.kill_soon()

    async def end(self) -> None:
        """Kills every process and waits until the kernel has taken the last. Idempotent."""
        if self._channel is not None:
            self._channel.fail(SandboxError("it was ended while this was running"))
        if self._launched is not None:
            with contextlib.suppress(SandboxError):  # the launcher has gone, and every sandbox with it
                await self._launched.kill()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1
        while self.handed_over:
            os.close(self.handed_over.pop())
