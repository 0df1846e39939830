"""The backend by explicit choice only: plain processes of this user in a private copy of the workspace. NO ISOLATION.

What a command can do here, you can do: read your files, use your network, kill your processes. It exists for machines
that forbid namespaces and for commands that are trusted. Copies stand under a private root, which commands find in
`$ALE_ROOT` (unset in an isolating backend): `bash "$ALE_ROOT/tests/test.sh"` is right in both. A process that leaves
its session and drops its environment cannot be found again, and outlives even the close of its sandbox.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import resource
import secrets
import signal
import time
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from ale.errors import SandboxError
from ale.sandbox.capture import Capture
from ale.sandbox.cgroup import Cgroups
from ale.sandbox.enforcement import Enforcement
from ale.sandbox.launcher import remove_tree
from ale.sandbox.layers import copy_tree
from ale.sandbox.one_shot import become, open_stdin
from ale.sandbox.port import (
    MAX_FILE_BYTES,
    Command,
    Completed,
    EngineStatistics,
    SandboxSpec,
    SandboxStatistics,
    environment,
)
from ale.sandbox.rocklet import LINGER_S, read_file, write_file
from ale.sandbox.shielded import shielded
from ale.sandbox.state import StateDirectory, default_parent, sweep

WARNING = "sandbox backend unsafe-process: commands run as ordinary processes of this user, with NO isolation"
_ROOT, _COMMAND = "ALE_ROOT", "ALE_COMMAND"  # environment marks by which processes are found again
_DYING_S = 10.0
_logger = logging.getLogger(__name__)


class UnsafeSnapshot:
    def __init__(self, engine: UnsafeProcessEngine, path: Path) -> None:
        self.engine, self.path = engine, path

    async def release(self) -> None:
        if self.path.exists():
            await shielded(asyncio.to_thread(remove_tree, self.path))


class UnsafeSandbox:
    def __init__(self, engine: UnsafeProcessEngine, spec: SandboxSpec, name: str) -> None:
        self.id = f"{spec.label}-{name}" if spec.label else name
        self._engine, self._spec = engine, spec
        self._root = engine.directory / "boxes" / name
        self._running: set[asyncio.Task[Completed]] = set()
        self._changing = asyncio.Lock()
        self._closed = False
        self._commands = self._timed_out = self._snapshots = 0

    def open(self) -> None:
        """Copies the base and the mounts to where the commands find them. Blocks."""
        workspace = self._inside(self._spec.workdir)
        workspace.mkdir(parents=True)
        if isinstance(self._spec.base, tuple):
            sources = [Path(source) for source in self._spec.base]
        elif isinstance(self._spec.base, UnsafeSnapshot) and self._spec.base.engine is self._engine:
            sources = [self._spec.base.path]
        else:
            raise SandboxError(f"SandboxSpec.base: {self._spec.base!r} is not a snapshot of this engine")
        try:
            for source in sources:
                if not source.is_dir():
                    raise SandboxError(f"SandboxSpec.base: {str(source)!r} is not a directory")
                copy_tree(source, workspace, None)
            for mount in self._spec.mounts:
                target = self._inside(mount.target)
                target.parent.mkdir(parents=True, exist_ok=True)
                if mount.writable:
                    target.symlink_to(Path(mount.source).absolute())
                else:
                    copy_tree(Path(mount.source), target, None)
        except OSError as error:
            raise SandboxError(f"cannot copy into sandbox {self.id}: {error}") from error

    def _inside(self, path: str) -> Path:
        """Where a path of the sandbox stands on the host; relative ones start at the workdir."""
        if "\0" in path:
            raise ValueError("a path cannot hold a NUL byte")
        return self._root / os.path.join(self._spec.workdir, path).lstrip("/")

    def _check(self) -> None:
        if self._closed:
            raise SandboxError(f"sandbox {self.id} is closed")

    async def exec(self, command: Command) -> Completed:
        self._check()
        task = asyncio.ensure_future(self._exec(command))
        self._running.add(task)
        try:
            await asyncio.wait([task])
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._running.discard(task)
        if task.cancelled():
            raise SandboxError(f"sandbox {self.id} was ended")
        completed = task.result()
        self._commands += 1
        self._timed_out += completed.timed_out
        return completed

    async def _exec(self, command: Command) -> Completed:
        limits = self._spec.limits
        mark = secrets.token_hex(8)
        env = environment(self._spec, command) | {_ROOT: str(self._root), _COMMAND: mark}
        directory = str(self._inside(command.cwd or ""))
        argv = become(self._engine.shell, command, directory, self._engine.rlimits(self._spec), limits.cpu_s)
        started = time.monotonic()
        with Capture(limits.output_bytes) as out, Capture(limits.output_bytes) as err:
            with open_stdin(command.stdin) as stdin:
                try:
                    process = await asyncio.create_subprocess_exec(
                        *argv, stdin=stdin, stdout=out.inlet, stderr=err.inlet, env=env, cwd="/", start_new_session=True
                    )
                except OSError as error:  # its arguments are too long
                    return Completed(exit_code=126, stderr=f"cannot start: {error.strerror}\n".encode())
            out.close_inlet()
            err.close_inlet()
            timed_out = False
            try:
                async with asyncio.timeout(command.timeout_s):
                    await process.wait()
            except TimeoutError:
                timed_out = True
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await shielded(asyncio.to_thread(kill_marked, f"{_COMMAND}={mark}"))
                    await shielded(process.wait())
            took_s = time.monotonic() - started
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await out.ended.wait()
                    await err.ended.wait()
            (stdout, stdout_dropped), (stderr, stderr_dropped) = out.finish(), err.finish()
        code = process.returncode
        assert code is not None
        return Completed(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            stdout=stdout,
            stderr=stderr,
            stdout_dropped=stdout_dropped,
            stderr_dropped=stderr_dropped,
            timed_out=timed_out,
            duration_s=took_s,
        )

    async def read_file(self, path: str, *, max_bytes: int = 1024 * 1024) -> bytes:
        self._check()
        if not 0 <= max_bytes <= MAX_FILE_BYTES:
            raise ValueError(f"max_bytes must be in 0..{MAX_FILE_BYTES}, got {max_bytes}")
        with naming(os.path.join(self._spec.workdir, path)):
            return await asyncio.to_thread(read_file, os.fsencode(self._inside(path)), max_bytes)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._check()
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"write_file takes at most {MAX_FILE_BYTES} bytes, got {len(data)}")
        with naming(os.path.join(self._spec.workdir, path)):
            await asyncio.to_thread(write_file, os.fsencode(self._inside(path)), mode & 0o777, data)

    async def snapshot(self) -> UnsafeSnapshot:
        return await shielded(self._snapshot())

    async def _snapshot(self) -> UnsafeSnapshot:
        async with self._changing:
            self._check()
            await self._end()
            path = self._engine.new_layer()
            await asyncio.to_thread(copy_tree, self._inside(self._spec.workdir), path, None)
            self._snapshots += 1
            return UnsafeSnapshot(self._engine, path)

    async def _end(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        await asyncio.to_thread(kill_marked, f"{_ROOT}={self._root}")

    def statistics(self) -> SandboxStatistics:
        return SandboxStatistics(commands=self._commands, timed_out=self._timed_out, snapshots=self._snapshots)

    async def close(self) -> None:
        await shielded(self._close())

    async def _close(self) -> None:
        async with self._changing:
            if not self._closed:
                self._closed = True
                await self._end()
                if self._root.exists():
                    await asyncio.to_thread(remove_tree, self._root)


class UnsafeProcessEngine:
    """Made by `open_engine("unsafe-process")`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.scratch = directory / "scratch"
        self.shell = "/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh"
        self._enforcement = Enforcement(Cgroups())
        self._names = itertools.count(1)
        self._alive: set[UnsafeSandbox] = set()
        self._closed = False
        self._started = self._runs = self._commands = self._timed_out = 0

    @asynccontextmanager
    async def start(self, spec: SandboxSpec) -> AsyncIterator[UnsafeSandbox]:
        async with self._open(spec) as sandbox:
            self._started += 1
            try:
                yield sandbox
            finally:
                self._commands += sandbox.statistics().commands
                self._timed_out += sandbox.statistics().timed_out

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[UnsafeSandbox]:
        if self._closed:
            raise SandboxError("the sandbox engine is closed")
        sandbox = UnsafeSandbox(self, spec, f"{next(self._names):x}")
        self._alive.add(sandbox)
        try:
            await shielded(asyncio.to_thread(sandbox.open))
            yield sandbox
        finally:
            try:
                await sandbox.close()
            finally:
                self._alive.discard(sandbox)

    async def run(self, spec: SandboxSpec, command: Command) -> Completed:
        async with self._open(spec) as sandbox:
            completed = await sandbox.exec(command)
        self._runs += 1
        self._timed_out += completed.timed_out
        return completed

    def rlimits(self, spec: SandboxSpec) -> dict[int, int]:
        limits = self._enforcement.resource_limits(spec.limits)
        limits.pop(resource.RLIMIT_NPROC, None)  # it would count this user's other processes
        return limits

    def new_layer(self) -> Path:
        return self.directory / "layers" / f"{next(self._names):x}"

    def capabilities(self) -> Mapping[str, str]:
        return {
            "isolation": "no: commands can do whatever this user can do",
            "memory": "prlimit, each process by itself",
            "pids": "no: they are this user's own",
            "file size": "prlimit",
            "cpu time": "prlimit, each process by itself",
            "disk": "no: only single files are bounded",
            "user": "no: the engine's own user",
            "network": "no: the host's",
            "state": str(self.directory),
        }

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            alive=len(self._alive),
            started=self._started,
            runs=self._runs,
            commands=self._commands,
            timed_out=self._timed_out,
            layers=sum(1 for _ in (self.directory / "layers").iterdir()) if not self._closed else 0,
        )

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await shielded(self._close_all())

    async def _close_all(self) -> None:
        await asyncio.gather(*(sandbox.close() for sandbox in list(self._alive)))


class naming:
    """Puts the path as the sandbox has it into the OSError of a file operation."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            error.filename = self._path


def kill_marked(mark: str) -> None:
    """Kills every process whose environment holds `mark`, until there is none. Blocks."""
    wanted = mark.encode()
    deadline = time.monotonic() + _DYING_S
    while time.monotonic() < deadline:
        found = False
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        os.kill(int(entry.name), signal.SIGKILL)
                        found = True
        if not found:
            return
        time.sleep(0.002)  # they are not our children: there is no wait for them


@asynccontextmanager
async def open_unsafe_process(*, state_dir: Path | None = None) -> AsyncIterator[UnsafeProcessEngine]:
    """Opens the engine, with a warning to the log and to Python's warnings."""
    _logger.warning(WARNING)
    warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
    parent = state_dir or default_parent()
    await asyncio.to_thread(sweep, parent)
    state = StateDirectory.make(parent, None)
    engine = UnsafeProcessEngine(state.path)
    try:
        yield engine
    finally:
        await engine.aclose()
        await shielded(asyncio.to_thread(state.remove))
