"""A sandbox of the local backend: a workspace on the host, and a namespace that shows it to commands when needed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import structs

from ale.audit import Alarm, AuditEvent
from ale.errors import SandboxError, SandboxStopped
from ale.sandbox.audit_log import AuditLog
from ale.sandbox.box import Box
from ale.sandbox.foundation import Foundation, LocalSnapshot
from ale.sandbox.layers import tree_bytes
from ale.sandbox.namespace import Namespace, OutOfMemory
from ale.sandbox.outside import Outside
from ale.sandbox.port import MAX_FILE_BYTES, Command, Completed, SandboxSpec, SandboxStatistics, environment
from ale.sandbox.shielded import shielded

if TYPE_CHECKING:
    from ale.sandbox.local import LocalEngine

_MB = 1024 * 1024
# A sandbox whose files took all its memory goes on with this much for its processes, so many times.
_LEAST_MEMORY_MB = 32
_MAX_OUT_OF_MEMORY = 3


class LocalSandbox:
    def __init__(self, engine: LocalEngine, spec: SandboxSpec, name: str) -> None:
        self.id = f"{spec.label}-{name}" if spec.label else name
        self._engine, self._spec, self._name = engine, spec, name
        self._foundation = Foundation(engine.store)
        self._namespace: Namespace | None = None
        self._incarnations = 0
        self._box: Box | None = None  # with the current upper directory
        self._changing = asyncio.Lock()  # start, snapshot and close exclude one another
        self._broken: SandboxError | None = None
        self._out_of_memory = 0  # how often
        self._closed = False
        self._commands = self._timed_out = self._snapshots = 0
        self._log = AuditLog(self.id, spec.alarms, self._stop)
        self._network = Outside(spec.network, self._log)

    async def open(self) -> None:
        await self._foundation.gather(self._spec)
        await self._running()

    async def _running(self) -> Namespace:
        if self._namespace is None:
            async with self._changing:
                self._check()
                if self._namespace is None:
                    await self._start()
        self._check()
        assert self._namespace is not None
        return self._namespace

    def _check(self) -> None:
        if self._closed:
            raise SandboxError(f"sandbox {self.id} is closed")
        if self._log.stopped is not None:
            raise self._log.stopped
        if self._broken is not None:
            raise SandboxError(f"sandbox {self.id} is broken: {self._broken}")

    async def _start(self) -> None:
        namespace = Namespace(f"{self._name}.{self._incarnations}")
        self._incarnations += 1
        if self._box is None:
            self._box = self._engine.make_box(namespace.name, self._spec.limits)
        overlay = self._foundation.overlay(self._engine.bottom, self._box.upper, self._box.work)
        spec = self._spec
        if self._out_of_memory:  # its files still take what the ended processes no longer do
            used_mb = await asyncio.to_thread(tree_bytes, self._box.path) // _MB
            memory_mb = max(_LEAST_MEMORY_MB, spec.limits.memory_mb - used_mb)
            spec = structs.replace(spec, limits=structs.replace(spec.limits, memory_mb=memory_mb))
        try:
            await self._engine.launch(namespace, spec, overlay, self._foundation.binds)
            await self._network.attach(namespace)
        except BaseException:
            await shielded(namespace.end())
            raise
        self._namespace = namespace

    def _stop(self, error: SandboxStopped) -> None:
        """An alarm ends the sandbox; what runs in it raises this error."""
        self._broken = error
        if self._namespace is not None:
            self._namespace.end_soon(error)

    def audit(self) -> Sequence[AuditEvent]:
        return tuple(self._log.events)

    def alarms(self) -> Sequence[Alarm]:
        return tuple(self._log.alarms)

    async def lock_network(self) -> None:
        await self._network.lock()

    async def exec(self, command: Command) -> Completed:
        namespace = await self._running()
        with self._log.command(self._engine.argv(command)) as number:
            forks = self._engine.refused_forks(namespace)
            completed = await self._exec(namespace, command)
            if (refused := self._engine.refused_forks(namespace) - forks) > 0:
                self._log.forks_refused(number, refused)
        if self._log.stopped is not None:
            raise self._log.stopped
        return completed

    async def _exec(self, namespace: Namespace, command: Command) -> Completed:
        limits = self._spec.limits
        env = environment(self._spec, command)
        try:
            with self._failures_of(namespace):
                completed = await namespace.run(
                    [os.fsencode(part) for part in self._engine.argv(command)],
                    [os.fsencode(f"{name}={value}") for name, value in env.items()],
                    os.fsencode(self._path(command.cwd or "")),
                    command.stdin,
                    timeout_s=command.timeout_s,
                    cpu_s=limits.cpu_s,
                    output_bytes=limits.output_bytes,
                )
        except OutOfMemory as error:
            completed = Completed(signal=signal.SIGKILL, stderr=f"killed: {error}\n".encode()[: limits.output_bytes])
        self._commands += 1
        self._timed_out += completed.timed_out
        self._engine.commands += 1
        self._engine.timed_out += completed.timed_out
        return completed

    async def read_file(self, path: str, *, max_bytes: int = 1024 * 1024) -> bytes:
        if not 0 <= max_bytes <= MAX_FILE_BYTES:
            raise ValueError(f"max_bytes must be in 0..{MAX_FILE_BYTES}, got {max_bytes}")
        namespace = await self._running()
        with self._failures_of(namespace):
            return await namespace.read(os.fsencode(self._path(path)), max_bytes)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"write_file takes at most {MAX_FILE_BYTES} bytes, got {len(data)}")
        namespace = await self._running()
        with self._failures_of(namespace):
            await namespace.write(os.fsencode(self._path(path)), mode & 0o777, data)

    def _path(self, path: str) -> str:
        if "\0" in path:
            raise ValueError("a path cannot hold a NUL byte")
        return os.path.join(self._spec.workdir, path)

    @contextmanager
    def _failures_of(self, namespace: Namespace) -> Iterator[None]:
        try:
            yield
        except OutOfMemory as error:
            if namespace is self._namespace:
                self._namespace = None
                self._out_of_memory += 1
                if self._out_of_memory > _MAX_OUT_OF_MEMORY:
                    self._broken = error
            raise
        except SandboxError as error:
            if self._log.stopped is not None:
                raise self._log.stopped from error
            if namespace is self._namespace and self._broken is None:  # not ended on purpose by snapshot or close
                self._broken = error
                self._engine.broken += 1
            raise SandboxError(f"sandbox {self.id}: {error}") from error

    async def snapshot(self) -> LocalSnapshot:
        return await shielded(self._snapshot())

    async def _snapshot(self) -> LocalSnapshot:
        async with self._changing:
            self._check()
            await self._end()
            foundation = self._foundation
            if self._box is not None and any(self._box.upper.iterdir()):
                foundation.layers.append(foundation.store.freeze(self._box))
                await asyncio.to_thread(self._box.remove)
                self._box = None
            self._snapshots += 1
            return LocalSnapshot(foundation.store, tuple(map(foundation.store.hold, foundation.layers)))

    async def _end(self) -> None:
        namespace, self._namespace = self._namespace, None
        await self._network.detach()
        if namespace is not None:
            await namespace.end()

    def statistics(self) -> SandboxStatistics:
        return SandboxStatistics(commands=self._commands, timed_out=self._timed_out, snapshots=self._snapshots)

    async def close(self) -> None:
        await shielded(self._close())

    async def _close(self) -> None:
        async with self._changing:
            if self._closed:
                return
            self._closed = True
            try:
                await self._end()
            finally:
                if self._box is not None:
                    await asyncio.to_thread(self._box.remove)
                await self._foundation.release()
