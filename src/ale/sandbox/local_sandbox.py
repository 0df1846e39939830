"""A sandbox of the local backend: a workspace on the host, and a namespace that shows it to commands when needed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import structs

from ale.sandbox.box import Box
from ale.sandbox.foundation import Foundation, LocalSnapshot
from ale.sandbox.layers import tree_bytes
from ale.sandbox.namespace import Namespace
from ale.sandbox.network import NO_NETWORK
from ale.sandbox.outside import Outside
from ale.sandbox.port import SandboxSpec
from ale.sandbox.rocklet_client import OutOfMemory
from ale.sandbox.rocklet_sandbox import RockletSandbox
from ale.sandbox.shielded import shielded

if TYPE_CHECKING:
    from ale.sandbox.local import LocalEngine

_MB = 1024 * 1024
# A sandbox whose files took all its memory goes on with this much for its processes, so many times.
_LEAST_MEMORY_MB = 32
_MAX_OUT_OF_MEMORY = 3


class LocalSandbox(RockletSandbox):
    _engine: LocalEngine

    def __init__(self, engine: LocalEngine, spec: SandboxSpec, name: str) -> None:
        super().__init__(engine, spec, name, engine.shell)
        self._foundation = Foundation(engine.store)
        self._incarnations = 0
        self._box: Box | None = None  # with the current upper directory
        self._times_out_of_memory = 0
        self._forks = 0  # refused to the present incarnation, as far as seen
        self._outside = Outside(spec.network, self.log)

    async def gather(self) -> None:
        await self._foundation.gather(self.spec)
        if isinstance(self.spec.base, LocalSnapshot):
            self.adopt(self.spec.base.sessions)
        self.adopt(self.spec.sessions)

    async def _launch(self) -> Namespace:
        namespace = Namespace(f"{self.name}.{self._incarnations}")
        self._incarnations += 1
        self._forks = 0
        if self._box is None:
            self._box = self._engine.make_box(namespace.name, self.spec.limits)
        overlay = self._foundation.overlay(self._engine.bottom, self._box.upper, self._box.work)
        spec = self.spec
        if self._times_out_of_memory:  # its files still take what the ended processes no longer do
            used_mb = await asyncio.to_thread(tree_bytes, self._box.path) // _MB
            memory_mb = max(_LEAST_MEMORY_MB, spec.limits.memory_mb - used_mb)
            spec = structs.replace(spec, limits=structs.replace(spec.limits, memory_mb=memory_mb))
        try:
            await self._engine.launch(namespace, spec, overlay, self._foundation.binds)
            await self._outside.attach(namespace)
        except BaseException:
            await shielded(namespace.end())
            raise
        return namespace

    async def lock_network(self) -> None:
        self.spec = structs.replace(self.spec, network=NO_NETWORK)  # of forks and of what follows a snapshot too
        await self._outside.lock()

    def _refused_forks(self) -> int:
        before, self._forks = self._forks, self._engine.refused_forks(f"{self.name}.{self._incarnations - 1}")
        return self._forks - before

    async def _end(self) -> None:
        await self._outside.detach()
        await super()._end()

    async def _freeze(self, sessions: Mapping[str, bytes]) -> LocalSnapshot:
        foundation = self._foundation
        if self._box is not None and any(self._box.upper.iterdir()):
            foundation.layers.append(foundation.store.freeze(self._box))
            await asyncio.to_thread(self._box.remove)
            self._box = None
            await foundation.flatten(self._engine.bottom)
        held = tuple(map(foundation.store.hold, foundation.layers))
        return LocalSnapshot(foundation.store, held, self.spec.workdir, sessions)

    async def _discard(self) -> None:
        if self._box is not None:
            await asyncio.to_thread(self._box.remove)
        await self._foundation.release()

    def _out_of_memory(self, error: OutOfMemory) -> None:
        self._times_out_of_memory += 1
        if self._times_out_of_memory > _MAX_OUT_OF_MEMORY:
            self._broken = error
