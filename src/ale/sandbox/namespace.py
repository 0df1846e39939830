"""A namespace: one incarnation of a sandbox, from the start of its rocklet to the death of its last process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from ale.errors import SandboxError
from ale.sandbox.channel import Channel
from ale.sandbox.door import Door
from ale.sandbox.launcher_client import Launched, LauncherClient
from ale.sandbox.rocklet_client import OutOfMemory, RockletClient

_START_S = 30.0
_DYING_S = 1.0
_SAID_BYTES = 2000  # of what bwrap and the rocklet print when they fail


class Namespace:
    """The processes of a sandbox; `rocklet` is how they are talked to, once it has started."""

    rocklet: RockletClient

    def __init__(self, name: str) -> None:
        self.name = name
        self._launched: Launched | None = None
        self._channel: Channel | None = None
        self._door: Door | None = None
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
        self._door = Door()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                stdio = (theirs.fileno(), self._door.inner.fileno(), self._stderr, gate.fileno())
                self._launched = await client.spawn(self.name, argv, stdio=stdio, limits=limits)
            self._door.shut_inner()
            self._channel = await Channel.open(ours, self._on_broken, self._door.connect)
        except BaseException:
            if self._channel is None:
                ours.close()
            raise
        self.rocklet = RockletClient(self._channel, self)
        channel, launched = self._channel, self._launched
        first: list[asyncio.Future[Any]] = [channel.ready, launched.ended]
        await asyncio.wait(first, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        if not channel.ready.done():
            cause = SandboxError("it did not start in time")
            channel.fail(cause)
        with contextlib.suppress(SandboxError):
            channel.ready.result()
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

    async def cause(self) -> SandboxError | None:
        """Why it ended by itself, where that is known; whatever is left of it is killed."""
        assert self._launched is not None
        ended = await self._launched.end(_DYING_S)
        self._release()
        return OutOfMemory("it used more memory than it may, files included") if ended.out_of_memory else None

    async def end(self) -> None:
        """Kills every process and waits until the kernel has taken the last. Idempotent."""
        if self._channel is not None:
            self._channel.fail(SandboxError("it was ended while this was running"))
        if self._launched is not None:
            with contextlib.suppress(SandboxError):  # the launcher has gone, and every sandbox with it
                await self._launched.kill()
        self._release()

    def _release(self) -> None:
        """Closes what the engine holds of a namespace whose processes have gone."""
        if self._door is not None:
            self._door.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1
        while self.handed_over:
            os.close(self.handed_over.pop())
