"""Sandboxes of a running service (`ale sandbox serve`), with the interface of an engine in this process.

    async with open_remote(url, token) as engine:
        async with engine.start(SandboxSpec(base=("environment",))) as sandbox:
            await sandbox.exec(Command(shell="ls"))

Host directories (`base`, mounts) are those of this machine: they are uploaded, once per content. Three things of the
port need the sandbox on this machine and raise UserError here: writable mounts, `forward` and `expose`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from ale.errors import SandboxError, UserError
from ale.sandbox import wire
from ale.sandbox.connection import Connection, ServiceSays
from ale.sandbox.layers import signature_of
from ale.sandbox.port import Command, Completed, EngineStatistics, SandboxSpec
from ale.sandbox.remote_sandbox import RemoteSandbox, RemoteSnapshot, only_here
from ale.sandbox.rocklet.trees import pack_tree
from ale.sandbox.shielded import shielded
from ale.sandbox.state import StateDirectory, default_parent
from ale.sandbox.transfer import packed


class RemoteEngine:
    """Made by `open_remote`. `statistics` asks the service without `await`: the event loop stands still meanwhile."""

    def __init__(self, connection: Connection, info: wire.ServiceInfo) -> None:
        self.connection = connection
        self.snapshots: set[RemoteSnapshot] = set()
        self._info = info
        self._open: set[str] = set()
        self._names = (f"{secrets.token_hex(6)}-{number}" for number in itertools.count(1))
        self._trees: dict[str, tuple[str, str, int]] = {}  # path -> signature, hash and size of what was packed
        self._state: StateDirectory | None = None

    @property
    def scratch(self) -> Path:
        """Of this machine, and made when it is first asked for. The sweep finds what a killed client leaves of it."""
        if self._state is None:
            self._state = StateDirectory.make(default_parent(), None)
        return self._state.path / "scratch"

    def new_name(self) -> str:
        return next(self._names)

    @asynccontextmanager
    async def start(self, spec: SandboxSpec) -> AsyncIterator[RemoteSandbox]:
        name = self.new_name()
        self._open.add(name)
        try:
            start = await self._wire(spec)
            said = await self.connection.once("PUT", _path(name), start, wire.SandboxInfo)
            yield RemoteSandbox(self, said)
        finally:
            await shielded(self.stop((name,)))

    async def attach(self, name: str) -> RemoteSandbox:
        """A sandbox that was started before, by whoever has this token; closing it stays theirs."""
        return RemoteSandbox(self, await self.connection.get(_path(name), wire.SandboxInfo))

    async def make(self, name: str, spec: SandboxSpec, *, template: str | None = None) -> RemoteSandbox:
        """Starts a sandbox that stays when this client goes. `template`: of the service's hub, instead of a base."""
        path = _path(name)
        start = await self._wire(spec)
        if template is not None:  # what the template says of these goes before defaults
            workdir = None if spec.workdir == SandboxSpec().workdir else spec.workdir
            limits = None if spec.limits == SandboxSpec().limits else spec.limits
            start = msgspec.structs.replace(start, template=template, workdir=workdir, limits=limits)
        said = await self.connection.once("PUT", path, start, wire.SandboxInfo)
        return RemoteSandbox(self, said)

    async def sandboxes(self) -> tuple[wire.SandboxInfo, ...]:
        """Every sandbox of this token, whoever started it."""
        return (await self.connection.get("/v1/sandboxes", wire.Sandboxes)).sandboxes

    async def info(self) -> wire.ServiceInfo:
        return await self.connection.get("/v1/service", wire.ServiceInfo)

    async def run(self, spec: SandboxSpec, command: Command) -> Completed:
        run = wire.Run(spec=await self._wire(spec), command=command)
        return await self.connection.once("POST", "/v1/run", run, Completed)

    def capabilities(self) -> Mapping[str, str]:
        return self._info.capabilities

    def statistics(self) -> EngineStatistics:
        said = self.connection.now("GET", "/v1/service", None, wire.ServiceInfo)
        return msgspec.convert(said.statistics, EngineStatistics, strict=False)

    async def stop(self, names: Sequence[str]) -> None:
        """Stops every one of them, and then raises what the first that could not be stopped said."""
        paths = [_path(name) for name in names]
        said = await asyncio.gather(*map(self.connection.delete, paths), return_exceptions=True)
        self._open.difference_update(name for name, error in zip(names, said, strict=True) if error is None)
        _raise_first(said)

    async def aclose(self) -> None:
        """Stops what was started here. Idempotent."""
        released = (snapshot.release() for snapshot in tuple(self.snapshots))
        try:
            _raise_first(await asyncio.gather(self.stop(tuple(self._open)), *released, return_exceptions=True))
        finally:
            await self.connection.close()
            state, self._state = self._state, None
            if state is not None:
                await asyncio.to_thread(state.remove)

    # -- what a spec is there

    async def _wire(self, spec: SandboxSpec) -> wire.Start:
        if any(mount.writable for mount in spec.mounts):
            only_here("a writable mount")
        given: dict[str, Any] = {}
        if isinstance(spec.base, tuple):
            given["trees"] = tuple([await self._tree(source, directory=True) for source in spec.base])
        elif isinstance(spec.base, RemoteSnapshot) and spec.base.engine is self:
            given["snapshot"] = spec.base.name
        else:
            raise SandboxError(f"SandboxSpec.base: {spec.base!r} is not a snapshot of this engine")
        mounts = [wire.TreeMount(tree=await self._tree(one.source), target=one.target) for one in spec.mounts]
        return wire.Start(
            **given,
            image=spec.image,
            workdir=spec.workdir,
            env=dict(spec.env),
            limits=spec.limits,
            mounts=tuple(mounts),
            network=spec.network,
            alarms=spec.alarms,
            sessions=dict(spec.sessions),
            label=spec.label,
        )

    async def _tree(self, source: str, *, directory: bool = False) -> str:
        """The hash of a host tree, which the service has when this returns."""
        try:
            path, sha256, size = await shielded(asyncio.to_thread(self._hash, source, directory))
        except OSError as error:
            raise SandboxError(f"cannot copy {source!r} into a sandbox: {error}") from error
        try:
            await self.connection.get(f"/v1/trees/{sha256}", wire.Nothing)
        except ServiceSays:
            await self.connection.upload(f"/v1/trees/{sha256}", packed(path), query={"size": size})
        return sha256

    def _hash(self, source: str, directory: bool) -> tuple[Path, str, int]:
        key = os.path.realpath(source, strict=True)
        if directory and not os.path.isdir(key):
            raise NotADirectoryError(f"{source} is not a directory")
        signature = signature_of(key)
        if (known := self._trees.get(key)) is not None and known[0] == signature:
            return Path(key), *known[1:]
        digest, size = hashlib.sha256(), 0
        for piece in pack_tree(os.fsencode(key), strict=True):
            digest.update(piece)
            size += len(piece)
        self._trees[key] = (signature, digest.hexdigest(), size)
        return Path(key), digest.hexdigest(), size


def _raise_first(said: Iterable[BaseException | None]) -> None:
    for error in said:
        if error is not None:
            raise error


def _path(name: str) -> str:
    """Where the service has a sandbox. Raises UserError at what would lead to another place."""
    if not wire.NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name of a sandbox: letters, digits, '.', '_' and '-', at most 63, a letter or digit first."
        )
    return f"/v1/sandboxes/{name}"


@asynccontextmanager
async def open_remote(url: str, token: str) -> AsyncIterator[RemoteEngine]:
    """The engine of the service at `url`. Leaving it stops what was started through it, and nothing else.

    Raises UserError when the service does not know the token, SandboxError when it does not answer.
    """
    connection = Connection(url, token)
    engine = None
    try:
        engine = RemoteEngine(connection, await connection.get("/v1/service", wire.ServiceInfo))
        yield engine
    finally:
        await shielded(engine.aclose() if engine is not None else connection.close())
