"""The engine's side of the launcher: starts sandboxes, kills them, and learns when the last process of each is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox import launcher
from ale.vitals import ProcessState, look
from ale.waiting import named, register

NAME = "launcher"
_START_S = 30.0
_SEND_S = 30.0
_END_S = 60.0
_MAX_MESSAGE = 1 << 16


class Ended(msgspec.Struct, frozen=True):
    """`exit_code` is negative for a signal; `setup`: the command inside was reached."""

    exit_code: int
    setup: bool
    out_of_memory: bool
    """The kernel ended the whole sandbox because it used more memory than it may."""


class LauncherConfig(msgspec.Struct, frozen=True, kw_only=True):
    directory: str
    seccomp: str
    user: tuple[int, int] | None
    cgroups: list[dict[str, Any]]
    lock_fd: int


class Launched:
    """One sandbox's processes. `ended` completes when all of them are gone; SandboxError when the launcher went."""

    def __init__(self, client: LauncherClient, name: str, ended: asyncio.Future[Ended]) -> None:
        self.name, self.ended = name, ended
        self._client = client

    async def end(self, patience_s: float) -> Ended:
        """Waits for an end that is near, and kills if it is not."""
        await asyncio.wait([self.ended], timeout=patience_s)
        return await self.kill()

    async def kill(self) -> Ended:
        """Kills what is left and waits for the end. Raises DeadlineExceeded when the kernel does not let go."""
        if not self.ended.done():
            await self._client.send({"kill": self.name})
        return await self.wait(_END_S)

    def kill_soon(self) -> None:
        """Asks for the kill without waiting, where nothing can be awaited; whoever owns the sandbox still waits."""
        if not self.ended.done():
            self._client.post({"kill": self.name})

    async def wait(self, deadline_s: float) -> Ended:
        with named(f"the end of sandbox {self.name}", on=f"process {NAME}", deadline_s=deadline_s):
            done, _ = await asyncio.wait([self.ended], timeout=deadline_s)
        if not done:
            raise DeadlineExceeded(f"the end of sandbox {self.name}", deadline_s)
        return self.ended.result()


class LauncherClient:
    """Owns the launcher process. Use `await LauncherClient.start(config)` and `await client.close()`."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process, self._control = process, control
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, Launched] = {}
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._sending = asyncio.Lock()
        self._gone = False
        self._loop.add_reader(control.fileno(), self._receive)

    @classmethod
    async def start(cls, config: LauncherConfig) -> LauncherClient:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        fields = msgspec.to_builtins(config) | {"engine": os.getpid(), "keep": [config.lock_fd]}
        with theirs:
            process = subprocess.Popen(  # noqa: ASYNC220 (once per engine, by vfork)
                [sys.executable, "-I", "-S", launcher.__file__, json.dumps(fields)],
                stdin=theirs.fileno(),
                env={},
                pass_fds=[config.lock_fd],
                start_new_session=True,  # a Ctrl-C at the terminal is the engine's to handle
            )
        client = cls(process, ours)
        register().processes[NAME] = client.state
        try:
            with named("the start of the sandbox launcher", on=f"process {NAME}", deadline_s=_START_S):
                async with asyncio.timeout(_START_S):
                    await client._ready
        except TimeoutError as error:
            await client.close()
            raise DeadlineExceeded("the start of the sandbox launcher", _START_S) from error
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def gone(self) -> bool:
        """It has died, or was closed: it starts nothing any more."""
        return self._gone

    @property
    def pid(self) -> int:
        return self._process.pid

    def state(self) -> ProcessState:
        return ProcessState(name=NAME, pid=self.pid, vitals=look(self.pid), asked=len(self._running))

    async def spawn(
        self, name: str, argv: Sequence[str], *, stdio: Sequence[int], limits: Mapping[str, int | str]
    ) -> Launched:
        """Starts bwrap with descriptors 0, 1 and 2 as given; they may be closed once this returns."""
        self._check()
        launched = self._running[name] = Launched(self, name, self._loop.create_future())
        try:
            await self.send({"spawn": name, "argv": argv, "limits": limits}, stdio)
        except BaseException:
            self._running.pop(name, None)
            raise
        return launched

    async def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        data = json.dumps(message).encode()
        async with self._sending:
            while True:
                self._check()
                try:
                    socket.send_fds(self._control, [data], fds)
                    return
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    raise SandboxError(f"the sandbox launcher does not take a request: {error}") from error

    def post(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode())

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._control.fileno(), lambda: None if ready.done() else ready.set_result(None))
        try:
            async with asyncio.timeout(_SEND_S):
                await ready
        except TimeoutError as error:
            raise DeadlineExceeded("room in the sandbox launcher's queue", _SEND_S) from error
        finally:
            self._loop.remove_writer(self._control.fileno())

    def _check(self) -> None:
        if self._gone:
            raise SandboxError("the sandbox engine has ended" if self._ready.done() else "the launcher did not start")

    def _receive(self) -> None:
        try:
            data = self._control.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._lost()
            return
        message = json.loads(data)
        if "ready" in message:
            if not self._ready.done():
                self._ready.set_result(None)
            return
        launched = self._running.pop(message["ended"], None)
        if launched is None or launched.ended.done():
            return
        if "error" in message:
            launched.ended.set_exception(SandboxError(message["error"]))
            launched.ended.exception()  # a caller that was cancelled need not look
        else:
            launched.ended.set_result(Ended(message["exit_code"], message["setup"], message["out_of_memory"]))

    def _lost(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._loop.remove_reader(self._control.fileno())
        if not self._ready.done():
            self._ready.set_exception(SandboxError("the sandbox launcher ended before it was ready; see stderr"))
        for launched in self._running.values():
            if not launched.ended.done():
                launched.ended.set_exception(SandboxError("the sandbox launcher has ended, and every sandbox with it"))
                launched.ended.exception()
        self._running.clear()

    async def close(self) -> None:
        """Ends every sandbox and the launcher; returns when both are gone. Idempotent."""
        self._lost()
        self._control.close()
        processes = register().processes
        if processes.get(NAME) == self.state:
            del processes[NAME]
        try:
            await asyncio.to_thread(self._process.wait, _END_S)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise DeadlineExceeded("the end of the sandbox launcher", _END_S) from error
