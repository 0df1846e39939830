"""The local backend: sandboxes out of Linux namespaces by bubblewrap. No daemon, no root, nothing to install but pip.

    engine ── spawn, kill ──> launcher ──> bwrap ──> rocklet (process 1) ──> commands
       └────────────── frames over a socket ────────────┘

A sandbox is a workspace on the host (layers and an upper directory) and a namespace, started when it is needed, that
shows it. A snapshot ends the namespace, and the upper directory becomes a layer; the next command starts another.
A one-shot run has no rocklet: the command's shell is what bwrap starts, and writes go to memory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import structs

from ale.errors import SandboxError
from ale.sandbox.box import Box
from ale.sandbox.bwrap import Bind, CommandLine, Overlay, copy_within_reach, find_bwrap, make_etc, unavailable
from ale.sandbox.cgroup import find_parents, make_cgroups
from ale.sandbox.enforcement import Enforcement
from ale.sandbox.foundation import Foundation
from ale.sandbox.interpreter import MOUNT_POINT, Interpreter
from ale.sandbox.launcher_client import LauncherConfig
from ale.sandbox.launchers import Launchers
from ale.sandbox.layers import LayerStore
from ale.sandbox.local_sandbox import LocalSandbox
from ale.sandbox.namespace import Namespace
from ale.sandbox.network import PROXY_PORT
from ale.sandbox.one_shot import become, run_once
from ale.sandbox.port import Command, Completed, Limits, SandboxSpec, environment
from ale.sandbox.quota import can_mount
from ale.sandbox.rocklet_engine import RockletEngine
from ale.sandbox.seccomp import filter_program, watch_program
from ale.sandbox.shielded import shielded
from ale.sandbox.state import SANDBOX_USER, SHARED_MEMORY, StateDirectory, default_parent, give, sweep

_MB = 1024 * 1024
WATCH_FILTER = f"{MOUNT_POINT}/watch.bpf"
_SHELLS = ("/bin/bash", "/bin/sh")


class LocalEngine(RockletEngine[LocalSandbox]):
    """Made by `open_engine("local")`."""

    def __init__(
        self,
        state: StateDirectory,
        enforcement: Enforcement,
        launchers: Launchers,
        line: CommandLine,
        interpreter: Interpreter,
    ) -> None:
        super().__init__()
        self._state, self._enforcement, self._launchers = state, enforcement, launchers
        self._line, self._interpreter = line, interpreter
        self.store = LayerStore(state.path / "layers", sandbox_user())
        self.bottom = state.path / "tools" / "empty"
        self.scratch = state.path / "scratch"
        self.shell = next(shell for shell in _SHELLS if os.access(shell, os.X_OK))

    # -- the port

    def _make(self, spec: SandboxSpec) -> LocalSandbox:
        self._without_image(spec)
        self._enforcement.check(spec.limits)
        return LocalSandbox(self, spec, self._name())

    async def run(self, spec: SandboxSpec, command: Command) -> Completed:
        self._check()
        self._without_image(spec)
        if spec.network.mode != "none":
            raise SandboxError("SandboxSpec.network: a one-shot run has no network; start a sandbox for that")
        self._enforcement.check(structs.replace(spec.limits, disk_mb=None, inodes=None))  # it writes to memory alone
        foundation = Foundation(self.store)
        try:
            await foundation.gather(spec)
            completed = await self._run(spec, command, foundation)
        except SandboxError:
            self._broken += 1
            raise
        finally:
            await shielded(foundation.release())
        self._runs += 1
        self._timed_out += completed.timed_out
        return completed

    def capabilities(self) -> Mapping[str, str]:
        return {
            **self._enforcement.capabilities(in_memory=self._state.path.is_relative_to(SHARED_MEMORY)),
            "user": f"uid {SANDBOX_USER[0]}" if sandbox_user() else "no: sandboxes run as the engine's own user",
            "network": "none, or through the egress proxy; attempts are reported by seccomp",
            "state": str(self._state.path),
        }

    def _layers(self) -> int:
        return self.store.alive

    async def _shut(self) -> None:
        await self._launchers.close()

    # -- for its sandboxes

    def make_box(self, name: str, limits: Limits) -> Box:
        return Box(self._state.path / "boxes" / name, sandbox_user(), limits)

    def refused_forks(self, group: str) -> int:
        """How often a process was refused to this incarnation of a sandbox because it had too many."""
        return self._enforcement.cgroups.refused_forks(group)

    async def launch(self, namespace: Namespace, spec: SandboxSpec, overlay: Overlay, binds: list[Bind]) -> None:
        """Starts `namespace` with a gate and a rocklet that hands its own resource limits on to every command."""
        limits = self._enforcement.resource_limits(spec.limits)
        *python, script = self._interpreter.argv
        proxy = spec.network.mode != "none"
        argv = self._line.build(
            overlay=overlay,
            workdir=spec.workdir,
            binds=binds,
            tmp_bytes=spec.limits.tmp_mb * _MB,
            env=self._interpreter.env,
            command=(
                *python,
                *(self._interpreter.gate, str(PROXY_PORT if proxy else 0), WATCH_FILTER, script),
                *(f"{number}={value}" for number, value in limits.items()),
            ),
            rocklet=True,
        )
        await namespace.start(await self._launchers.living(), argv, self._enforcement.group_limits(spec.limits))

    async def _run(self, spec: SandboxSpec, command: Command, foundation: Foundation) -> Completed:
        argv = self._line.build(
            overlay=foundation.overlay(self.bottom, None, None),
            workdir=spec.workdir,
            binds=foundation.binds,
            tmp_bytes=spec.limits.tmp_mb * _MB,
            env=environment(spec, command),
            command=become(
                self.shell,
                command,
                os.path.join(spec.workdir, command.cwd) if command.cwd is not None else None,
                self._enforcement.resource_limits(spec.limits),
                spec.limits.cpu_s,
            ),
            rocklet=False,
        )
        limits = self._enforcement.group_limits(spec.limits)
        client = await self._launchers.living()
        return await run_once(client, self._name(), argv, limits, command, spec.limits.output_bytes)


def sandbox_user() -> tuple[int, int] | None:
    return SANDBOX_USER if os.geteuid() == 0 else None


@asynccontextmanager
async def open_local(*, state_dir: Path | None = None, bwrap: Path | None = None) -> AsyncIterator[LocalEngine]:
    """Opens the local engine. `state_dir`: where its directory goes; `bwrap`: another binary than the one found.

    Raises SandboxUnavailable, with the cure, when this machine does not let it isolate processes.
    """
    parent = state_dir or default_parent()
    binary = bwrap if bwrap is not None else await asyncio.to_thread(find_bwrap)
    await asyncio.to_thread(sweep, parent)
    user = sandbox_user()
    stack = AsyncExitStack()
    try:
        state = StateDirectory.make(parent, user)
        stack.push_async_callback(asyncio.to_thread, state.remove)
        parents = find_parents()
        state.record(parents.directories(state.name))
        cgroups = make_cgroups(state.name, user, parents)
        stack.push_async_callback(asyncio.to_thread, cgroups.remove)
        line, interpreter = await asyncio.to_thread(furnish, state, binary)
        config = LauncherConfig(
            directory=str(state.path),
            seccomp=str(state.path / "tools" / "seccomp"),
            user=user,
            cgroups=[msgspec.to_builtins(hierarchy) for hierarchy in cgroups.hierarchies],
            lock_fd=state.lock_fd,
        )
        enforcement = Enforcement(cgroups, await asyncio.to_thread(can_mount, state.path / "boxes"))
        launchers = await Launchers.start(config)
        engine = LocalEngine(state, enforcement, launchers, line, interpreter)
        stack.push_async_callback(engine.aclose)
        await probe(engine)
        yield engine
    finally:
        await shielded(stack.aclose())


def furnish(state: StateDirectory, binary: Path) -> tuple[CommandLine, Interpreter]:
    """Lays out what all sandboxes of the engine share: bwrap, the rocklet's interpreter, /etc, the filter."""
    tools = state.path / "tools"
    if sandbox_user() is not None and not binary.is_relative_to("/usr"):
        binary = copy_within_reach(binary, tools)
    interpreter = Interpreter(tools / "rocklet")
    make_etc(tools / "etc")
    (tools / "empty").mkdir()
    (tools / "seccomp").write_bytes(filter_program())
    (interpreter.directory / Path(WATCH_FILTER).name).write_bytes(watch_program())
    give(tools, sandbox_user())
    return CommandLine(binary, tools / "etc", interpreter.directory), interpreter


async def probe(engine: LocalEngine) -> None:
    """Proves that sandboxes can be made here, by making one."""
    try:
        completed = await engine.run(SandboxSpec(), Command(argv=("/bin/sh", "-c", "exit 0")))
    except SandboxError as error:
        raise unavailable(str(error)) from error
    if not completed.ok:
        raise unavailable(f"a probe ended with {completed}")
