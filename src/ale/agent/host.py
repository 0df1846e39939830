"""The user's directory itself, by ordinary processes of this user: NO ISOLATION. Only by explicit choice.

The sandbox port without a sandbox: a rocklet runs the commands, so that a session carries over, a time-out ends a whole
process tree, and nothing that the agent started outlives it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from ale.agent.events import Settled
from ale.errors import SandboxUnavailable
from ale.sandbox import Command, Limits, SandboxSpec, Snapshot
from ale.sandbox.rocklet_engine import RockletEngine
from ale.sandbox.rocklet_sandbox import RockletSandbox
from ale.sandbox.shielded import shielded
from ale.sandbox.state import ROOT_MARK
from ale.sandbox.unsafe_process import Processes

_NO_COPY = "This workspace is the user's own directory: it has no snapshots, forks or network policy."
_SHELLS = ("/bin/bash", "/bin/sh")
# The port wants a workdir outside /usr, /tmp and the like; paths here are the host's, so this one is never used.
_NO_WORKDIR = "/workspace"


class HostEngine(RockletEngine["HostSandbox"]):
    """Has one sandbox, the directory; nothing else can be started."""

    def _make(self, spec: SandboxSpec) -> HostSandbox:
        raise SandboxUnavailable(_NO_COPY)

    def _layers(self) -> int:
        return 0

    def capabilities(self) -> Mapping[str, str]:
        return {"isolation": "no: commands can do whatever this user can do"}


class HostSandbox(RockletSandbox):
    def __init__(self, directory: Path, mark: Path, secret: Sequence[str] = ()) -> None:
        shell = next(shell for shell in _SHELLS if os.access(shell, os.X_OK))
        super().__init__(HostEngine(), SandboxSpec(workdir=_NO_WORKDIR, limits=Limits(), label="host"), "agent", shell)
        self._directory, self._mark, self._secret = directory, mark, frozenset(secret)

    async def gather(self) -> None:
        """The directory is there."""

    def _path(self, path: str) -> str:
        if "\0" in path:
            raise ValueError("a path cannot hold a NUL byte")
        return os.path.join(self._directory, path)

    def _environment(self, command: Command) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in self._secret}
        return {**own, **command.env, ROOT_MARK: str(self._mark)}

    async def _launch(self) -> Processes:
        processes = Processes(self._mark)
        try:
            await processes.start({})
        except BaseException:
            await shielded(processes.end())
            raise
        return processes

    async def _freeze(self, sessions: Mapping[str, bytes]) -> Snapshot:
        raise SandboxUnavailable(_NO_COPY)

    async def _discard(self) -> None:
        """The directory is the user's."""

    async def lock_network(self) -> None:
        raise SandboxUnavailable(_NO_COPY)


class HostWorkspace:
    isolated = False

    def __init__(self, directory: Path, scratch: str, sandbox: HostSandbox) -> None:
        self.root, self.scratch, self.sandbox = str(directory), scratch, sandbox

    async def refresh(self) -> tuple[str, ...]:
        return ()  # it is the directory

    async def settle(self) -> Settled | None:
        return None


@asynccontextmanager
async def open_host(directory: Path, *, scratch: Path, secret: Sequence[str] = ()) -> AsyncIterator[HostWorkspace]:
    """`scratch` is made when something is kept there; it also marks the processes. `secret`: variables of this process
    that commands do not get."""
    sandbox = HostSandbox(directory, scratch, secret)
    try:
        await sandbox.start()
        yield HostWorkspace(directory, str(scratch), sandbox)
    finally:
        await sandbox.close()
