"""A sandbox of the Docker backend: a container, whose layer is the workspace and whose processes start when needed.

A snapshot is an image, committed while no process runs; the container goes on with the next command. What lies in
tmpfs (/tmp) or on volumes (the rocklet, mounts) is no part of a container's layer, so no part of a snapshot.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aiodocker.containers import DockerContainer
from msgspec import structs

from ale.errors import SandboxError
from ale.sandbox.docker.files import copy_mounts, pack_workspace
from ale.sandbox.docker.images import Image, ImageStore
from ale.sandbox.docker.processes import Processes
from ale.sandbox.egress import EgressProxy
from ale.sandbox.launcher import remove_tree
from ale.sandbox.network import NO_NETWORK, PROXY_PORT, proxy_environment
from ale.sandbox.port import Command, SandboxSpec, environment
from ale.sandbox.rocklet_client import OutOfMemory
from ale.sandbox.rocklet_sandbox import RockletSandbox
from ale.sandbox.shielded import shielded
from ale.sandbox.tunnel import encode

if TYPE_CHECKING:
    from ale.sandbox.docker.engine import DockerEngine

_SHELLS = ("/bin/bash", "/usr/bin/bash")
_SH = "/bin/sh"
_MAX_OUT_OF_MEMORY = 3  # so often the processes of a sandbox may be ended for their memory


class DockerSnapshot:
    def __init__(self, store: ImageStore, image: Image, workdir: str, sessions: Mapping[str, bytes]) -> None:
        self.store, self.image = store, image
        self.workdir, self.sessions = workdir, sessions
        self._held = True

    def check(self, store: ImageStore, workdir: str) -> None:
        if store is not self.store:
            raise SandboxError("a snapshot stands on the images of the engine that made it, and this is another engine")
        if not self._held:
            raise SandboxError("this snapshot was released")
        if workdir != self.workdir:
            raise SandboxError(
                f"SandboxSpec.workdir: a snapshot is an image in Docker, and this one has its workspace at "
                f"{self.workdir}, not at {workdir}"
            )

    async def release(self) -> None:
        if self._held:
            self._held = False
            await shielded(self.store.let_go(self.image))


class DockerSandbox(RockletSandbox):
    _engine: DockerEngine

    def __init__(self, engine: DockerEngine, spec: SandboxSpec, name: str) -> None:
        super().__init__(engine, spec, name, _SH)
        self._image: Image | None = None
        self._container: DockerContainer | None = None
        self._box = engine.directory / "boxes" / name
        self._proxy: EgressProxy | None = None
        self._times_out_of_memory = 0

    async def gather(self) -> None:
        spec, engine = self.spec, self._engine
        sources: tuple[str, ...] = ()
        if isinstance(spec.base, tuple):
            sources = spec.base
            self._image = await engine.image_of(spec)
        elif isinstance(spec.base, DockerSnapshot):
            spec.base.check(engine.images, spec.workdir)
            self._image = engine.images.hold(spec.base.image)
        else:
            raise SandboxError(f"SandboxSpec.base: {spec.base!r} is not a snapshot of this engine")
        await shielded(self._create(self._image))
        if spec.network.mode != "none":
            await self._open_proxy()
        if isinstance(spec.base, tuple):
            await self._fill(sources)
        self._shell = await self._find_shell(self._image)
        if isinstance(spec.base, DockerSnapshot):
            self.adopt(spec.base.sessions)
        self.adopt(spec.sessions)

    async def _create(self, image: Image) -> None:
        mounts = await asyncio.to_thread(copy_mounts, self.spec.mounts, self._box)
        self._container = await self._engine.create(self.name, self.spec, image, mounts)

    async def _open_proxy(self) -> None:
        """Every incarnation listens for it inside, and the connections come out over the rocklet's own."""
        path = self._box / "egress"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        self._proxy = EgressProxy(self.spec.network, self.log.request, self.log.asker)
        await self._proxy.start(listener)
        self._exposed.add(encode(PROXY_PORT), path)

    async def _fill(self, sources: tuple[str, ...]) -> None:
        """Copies the base to the workdir, which is made."""
        assert self._container is not None
        with tempfile.TemporaryFile(dir=self._box) as file:
            await shielded(asyncio.to_thread(pack_workspace, file, self.spec.workdir, sources))
            file.seek(0)
            await self._engine.daemon.put(self._container, file)

    async def _find_shell(self, image: Image) -> str:
        assert self._container is not None
        if not image.shell:
            found = [shell for shell in _SHELLS if await self._engine.daemon.holds(self._container, shell)]
            image.shell = found[0] if found else _SH
        return image.shell

    async def _launch(self) -> Processes:
        assert self._container is not None
        processes = Processes(self._engine.daemon, self._container, self._engine.bridge)
        try:
            await processes.start()
        except BaseException:
            await shielded(processes.end())
            raise
        return processes

    def _environment(self, command: Command) -> dict[str, str]:
        """An image's own variables lie above the defaults and below what was asked for, the proxy included."""
        image = self._image.env if self._image is not None else {}
        asked = {**proxy_environment(self.spec.network), **self.spec.env, **command.env}
        return {**environment(self.spec, command), **image, **asked}

    async def _freeze(self, sessions: Mapping[str, bytes]) -> DockerSnapshot:
        assert self._container is not None
        assert self._image is not None
        image = await self._engine.images.commit(self._container, self._image)
        return DockerSnapshot(self._engine.images, image, self.spec.workdir, sessions)

    async def _discard(self) -> None:
        async with AsyncExitStack() as stack:  # whatever one of them says
            image, self._image = self._image, None
            if image is not None:
                stack.push_async_callback(self._engine.images.let_go, image)
            if self._box.exists():
                stack.push_async_callback(asyncio.to_thread, remove_tree, self._box)
            stack.push_async_callback(self._engine.remove, self.name)
            if self._proxy is not None:
                stack.push_async_callback(self._proxy.close)

    async def lock_network(self) -> None:
        self.spec = structs.replace(self.spec, network=NO_NETWORK)  # of forks too
        if self._proxy is not None:
            await self._proxy.lock()

    def _out_of_memory(self, error: OutOfMemory) -> None:
        self._times_out_of_memory += 1
        if self._times_out_of_memory > _MAX_OUT_OF_MEMORY:
            self._broken = error
