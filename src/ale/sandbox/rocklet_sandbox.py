"""A sandbox that has a rocklet in it: everything of the port that goes through one, whatever the backend.

A backend says what is laid out first (`gather`), how processes are started (`_launch`), what a snapshot is (`_freeze`)
and what is left to delete (`_discard`). Processes are an incarnation: a snapshot ends one, and the next request that
needs it starts another.
"""

from __future__ import annotations

import asyncio
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from msgspec import structs

from ale.audit import Alarm, AuditEvent
from ale.errors import SandboxError, SandboxStopped
from ale.sandbox.audit_log import AuditLog
from ale.sandbox.exposed import Exposed
from ale.sandbox.port import (
    MAX_FILE_BYTES,
    MAX_TRANSFER_BYTES,
    Address,
    Command,
    Completed,
    FileInfo,
    SandboxSpec,
    SandboxStatistics,
    Snapshot,
    environment,
)
from ale.sandbox.rocklet_client import OutOfMemory, RockletClient
from ale.sandbox.session import ShellSession
from ale.sandbox.shielded import shielded
from ale.sandbox.stream import Stream
from ale.sandbox.terminal import TerminalSession, attend, check_size
from ale.sandbox.transfer import download, upload
from ale.sandbox.tunnel import Relays, encode

if TYPE_CHECKING:
    from ale.sandbox.rocklet_engine import RockletEngine

T = TypeVar("T")

# Of a sandbox's root in the state of its sessions, where that is not "/": no shell can write a NUL.
ROOT_PLACEHOLDER = b"\0root\0"


class Incarnation(Protocol):
    """The processes of a sandbox, from the start of its rocklet to the death of the last."""

    rocklet: RockletClient

    async def end(self) -> None: ...


class RockletSandbox(ABC):
    def __init__(self, engine: RockletEngine[Any], spec: SandboxSpec, name: str, shell: str) -> None:
        self._engine = engine
        self.name, self.spec = name, spec
        self._label, self._shell = spec.label, shell
        self._incarnation: Incarnation | None = None
        self._dead: list[Incarnation] = []  # that ended by themselves, with what is left of them here
        self._changing = asyncio.Lock()  # start, snapshot and close exclude one another
        self._broken: SandboxError | None = None
        self._closed = False
        self._sessions: dict[str, ShellSession] = {}
        self._relays = Relays()
        self._exposed = Exposed(self._relays)
        self._commands = self._timed_out = self._snapshots = self._reconnects = 0
        self.log = AuditLog(self.id, spec.alarms, self._stop)

    # -- what a backend says

    @abstractmethod
    async def gather(self) -> None:
        """Takes hold of what the workspace stands on, its sessions too; no process yet."""

    @abstractmethod
    async def _launch(self) -> Incarnation:
        """Starts processes on the present workspace."""

    @abstractmethod
    async def _freeze(self, sessions: Mapping[str, bytes]) -> Snapshot:
        """A snapshot of the workspace, on which no process runs now."""

    @abstractmethod
    async def _discard(self) -> None:
        """Deletes what the sandbox has outside."""

    def _path(self, path: str) -> str:
        """Where the rocklet finds a path of the port."""
        if "\0" in path:
            raise ValueError("a path cannot hold a NUL byte")
        return os.path.join(self.spec.workdir, path)

    def _outer_root(self) -> str:
        """What the absolute paths of the port start with where the rocklet is."""
        return ""

    def _environment(self, command: Command) -> dict[str, str]:
        return environment(self.spec, command)

    def _out_of_memory(self, error: OutOfMemory) -> None:  # noqa: B027 (only some backends can tell)
        """The processes were ended for their memory; the next request starts others, unless the backend refuses."""

    @abstractmethod
    async def lock_network(self) -> None:
        """As the port has it."""

    def _refused_forks(self) -> int:
        """How often a process was refused since the last look because there were too many; 0 where nobody counts."""
        return 0

    # -- life

    @property
    def id(self) -> str:
        return f"{self._label}-{self.name}" if self._label else self.name

    def assign(self, label: str) -> None:
        self._label = label
        self.log.sandbox = self.id

    def adopt(self, sessions: Mapping[str, bytes]) -> None:
        """Takes up the sessions of a snapshot or checkpoint."""
        for name, state in sessions.items():
            state = state.replace(ROOT_PLACEHOLDER, os.fsencode(self._outer_root()))
            self._sessions[name] = ShellSession(name, state, self._run, self._shell)

    async def start(self) -> None:
        await self._running()

    async def _running(self) -> Incarnation:
        if self._incarnation is None:
            async with self._changing:
                self._check()
                if self._incarnation is None:
                    self._incarnation = await self._begin()
        self._check()
        assert self._incarnation is not None
        return self._incarnation

    async def _begin(self) -> Incarnation:
        await self._bury()
        incarnation = await self._launch()
        try:
            await self._exposed.show_again(incarnation.rocklet)
        except SandboxError as error:
            await shielded(incarnation.end())
            raise SandboxError(f"sandbox {self.id}: {error}") from error
        except BaseException:
            await shielded(incarnation.end())
            raise
        return incarnation

    def _check(self) -> None:
        if self._closed:
            raise SandboxError(f"sandbox {self.id} is closed")
        if self.log.stopped is not None:
            raise self.log.stopped
        if self._broken is not None:
            raise SandboxError(f"sandbox {self.id} is broken: {self._broken}")

    async def _ask(self, work: Callable[[RockletClient], Awaitable[T]]) -> T:
        incarnation = await self._running()
        try:
            return await work(incarnation.rocklet)
        except OutOfMemory as error:
            if incarnation is self._incarnation:
                self._leave()
                self._dead.append(incarnation)
                self._out_of_memory(error)
            raise
        except SandboxError as error:
            if self.log.stopped is not None:
                raise self.log.stopped from error
            # Broken is what failed by itself; snapshot and close end an incarnation on purpose.
            if incarnation is self._incarnation and incarnation.rocklet.channel.broken and self._broken is None:
                self._broken = error
                self._engine.count(None)
            raise SandboxError(f"sandbox {self.id}: {error}") from error

    def _leave(self) -> Incarnation | None:
        incarnation, self._incarnation = self._incarnation, None
        if incarnation is not None:
            self._reconnects += incarnation.rocklet.channel.reconnects
        return incarnation

    async def _end(self) -> None:
        incarnation = self._leave()
        if incarnation is not None:
            self._dead.append(incarnation)
        await self._bury()

    async def _bury(self) -> None:
        while self._dead:
            await self._dead.pop().end()

    async def close(self) -> None:
        await shielded(self._close())

    async def _close(self) -> None:
        async with self._changing:
            if self._closed:
                return
            self._closed = True
            try:
                await self._end()
                await self._relays.close()
            finally:
                await self._discard()

    # -- what it is seen to do

    def audit(self) -> Sequence[AuditEvent]:
        return tuple(self.log.events)

    def alarms(self) -> Sequence[Alarm]:
        return tuple(self.log.alarms)

    def _stop(self, error: SandboxStopped) -> None:
        """An alarm ends the sandbox: what runs in it raises this error, and so does what comes."""
        if self._incarnation is not None:
            self._incarnation.rocklet.channel.fail(error)

    # -- commands

    async def exec(self, command: Command) -> Completed:
        completed, _ = await self._run(command, None)
        return completed

    def session(self, name: str = "main") -> ShellSession:
        if name not in self._sessions:
            self._sessions[name] = ShellSession(name, b"", self._run, self._shell)
        return self._sessions[name]

    async def _run(self, command: Command, session: bytes | None) -> tuple[Completed, bytes]:
        limits = self.spec.limits
        argv, env, cwd = self._words(command)
        await self._running()  # a start takes its time, and is no part of the command
        with self.log.command(argv) as number:
            try:
                completed, state = await self._ask(
                    lambda rocklet: rocklet.run(
                        argv,
                        env,
                        cwd,
                        command.stdin,
                        timeout_s=command.timeout_s,
                        cpu_s=limits.cpu_s,
                        output_bytes=limits.output_bytes,
                        session=session,
                    )
                )
            except OutOfMemory as error:
                said = f"killed: {error}\n".encode()[: limits.output_bytes]
                completed, state = Completed(signal=signal.SIGKILL, stderr=said), b""
            if (refused := self._refused_forks()) > 0:
                self.log.forks_refused(number, refused)
        if self.log.stopped is not None:
            raise self.log.stopped
        self._commands += 1
        self._timed_out += completed.timed_out
        self._engine.count(completed)
        return completed, state

    def _words(self, command: Command) -> tuple[bytes, bytes, bytes]:
        """Arguments, environment and directory as the rocklet takes them: lists have NULs between."""
        argv = command.argv if command.argv is not None else (self._shell, "-c", command.shell or "")
        env = "\0".join([f"{name}={value}" for name, value in self._environment(command).items()])
        return os.fsencode("\0".join(argv)), os.fsencode(env), os.fsencode(self._path(command.cwd or ""))

    @asynccontextmanager
    async def terminal(self, command: Command, *, rows: int = 24, columns: int = 80) -> AsyncIterator[TerminalSession]:
        check_size(rows, columns)
        argv, env, cwd = self._words(command)
        if "TERM" not in self.spec.env and "TERM" not in command.env:
            env += b"\0TERM=xterm"
        cpu_s = self.spec.limits.cpu_s
        stream = await self._ask(
            lambda rocklet: rocklet.terminal(argv, env, cwd, rows=rows, columns=columns, cpu_s=cpu_s)
        )
        with self.log.command(argv):
            async with attend(stream, rows, columns) as terminal:
                yield terminal

    async def ping(self, *, deadline_s: float = 5.0) -> None:
        await self._ask(lambda rocklet: rocklet.ping(deadline_s))

    # -- files

    async def read_file(self, path: str, *, max_bytes: int = 1024 * 1024) -> bytes:
        if not 0 <= max_bytes <= MAX_FILE_BYTES:
            raise ValueError(f"max_bytes must be in 0..{MAX_FILE_BYTES}, got {max_bytes}")
        with self._naming(path) as inside:
            return await self._ask(lambda rocklet: rocklet.read(inside, max_bytes))

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"write_file takes at most {MAX_FILE_BYTES} bytes, got {len(data)}: use upload")
        with self._naming(path) as inside:
            await self._ask(lambda rocklet: rocklet.write(inside, mode & 0o777, data))

    async def list_files(self, path: str = ".") -> tuple[FileInfo, ...]:
        with self._naming(path) as inside:
            return await self._ask(lambda rocklet: rocklet.list(inside))

    async def stat(self, path: str) -> FileInfo:
        with self._naming(path) as inside:
            return structs.replace(await self._ask(lambda rocklet: rocklet.stat(inside)), name=path)

    async def upload(self, source: Path, target: str, *, max_bytes: int = MAX_TRANSFER_BYTES) -> None:
        with self._naming(target) as inside:

            async def send(rocklet: RockletClient) -> None:
                await upload(await rocklet.unpack(inside, max_bytes), source)

            await self._ask(send)

    async def download(self, source: str, target: Path, *, max_bytes: int) -> int:
        with self._naming(source) as inside:

            async def receive(rocklet: RockletClient) -> int:
                return await download(await rocklet.pack(inside), target, max_bytes)

            return await self._ask(receive)

    @contextmanager
    def _naming(self, path: str) -> Iterator[bytes]:
        """The path as the rocklet finds it; an OSError about that path names it as the sandbox has it."""
        inside = self._path(path)
        try:
            yield os.fsencode(inside)
        except OSError as error:
            if error.filename == inside:
                error.filename = os.path.join(self.spec.workdir, path)
            raise

    # -- tunnels

    @asynccontextmanager
    async def forward(self, outside: Path, inside: Address) -> AsyncIterator[None]:
        address = encode(inside)

        async def connect() -> Stream:
            return await self._ask(lambda rocklet: rocklet.connect(address))

        self._check()
        async with self._relays.forward(outside, connect):
            yield

    @asynccontextmanager
    async def expose(self, outside: Path, inside: Address) -> AsyncIterator[None]:
        address = encode(inside)
        self._exposed.check_free(address)
        await self._ask(lambda rocklet: self._exposed.show(rocklet, address, outside))
        try:
            yield
        finally:
            self._exposed.hide(address)

    # -- snapshots

    async def snapshot(self) -> Snapshot:
        making = asyncio.ensure_future(self._snapshot())
        try:
            return await shielded(making)
        except asyncio.CancelledError:
            if not making.cancelled() and making.exception() is None:  # it is there, and nobody will ever release it
                await shielded(making.result().release())
            raise

    async def _snapshot(self) -> Snapshot:
        async with self._changing:
            self._check()
            await self._end()
            self._snapshots += 1
            root = os.fsencode(self._outer_root())
            states = {name: session.state for name, session in self._sessions.items()}
            return await self._freeze(
                {name: state.replace(root, ROOT_PLACEHOLDER) if root else state for name, state in states.items()}
            )

    @asynccontextmanager
    async def fork(self, count: int) -> AsyncIterator[tuple[RockletSandbox, ...]]:
        if count < 1:
            raise ValueError(f"a fork makes at least 1 sandbox, got {count}")
        snapshot = await self.snapshot()
        async with AsyncExitStack() as stack:
            try:
                spec = structs.replace(self.spec, base=snapshot, label=self._label)
                forks = [await stack.enter_async_context(self._engine.open(spec)) for _ in range(count)]
            finally:
                await snapshot.release()
            yield tuple(forks)

    def statistics(self) -> SandboxStatistics:
        alive = self._incarnation.rocklet.channel.reconnects if self._incarnation is not None else 0
        return SandboxStatistics(
            commands=self._commands,
            timed_out=self._timed_out,
            snapshots=self._snapshots,
            reconnects=self._reconnects + alive,
        )
