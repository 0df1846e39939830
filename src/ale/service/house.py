"""The house: one engine of sandboxes, its tenants, and the rules they share. It owns what lives between requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from ale.hub import Entry, Hub
from ale.sandbox.checkpoint import checkpoint
from ale.sandbox.held import Held
from ale.sandbox.launcher import remove_tree
from ale.sandbox.layers import SHARED
from ale.sandbox.port import (
    Limits,
    Mount,
    Sandbox,
    SandboxEngine,
    SandboxSpec,
    Snapshot,
)
from ale.sandbox.shielded import shielded
from ale.sandbox.wire import Malformed, SandboxInfo, Start, UnknownName, printable
from ale.service.tenant import Box, Kept, KeptSnapshot, ServiceLimits, Tenant

logger = logging.getLogger(__name__)

_CLOSE_S = 300.0  # a workspace of millions of files takes its time to go


class House:
    def __init__(
        self, engine: SandboxEngine, tenants: Mapping[str, str], limits: ServiceLimits, hub: Hub | None, folder: Path
    ) -> None:
        """`tenants`: names and tokens. `folder`: where their trees are kept, within the engine's scratch directory."""
        self.engine, self.limits, self.hub = engine, limits, hub
        self.tenants = {name: Tenant(name, folder / name, limits) for name in tenants}
        for tenant in self.tenants.values():
            tenant.folder.mkdir(parents=True)
        self._made = asyncio.Event()
        self._expiring: dict[Kept, asyncio.Task[None]] = {}

    # -- sandboxes

    async def start(self, tenant: Tenant, name: str, start: Start) -> SandboxInfo:
        idle_s = self._idle_s(start.idle_s)
        with (
            tenant.reserving("sandbox", tenant.boxes, self.limits.sandboxes, name),
            self.spec(tenant, start) as spec,
        ):
            held = Held(self.engine.start(spec))
            try:
                box = Box(name, await held.value(), spec.label, idle_s, held.close)
                return self._keep(tenant, box).info()
            except BaseException:
                tenant.boxes.pop(name, None)
                await shielded(held.close())
                raise

    async def fork(self, tenant: Tenant, box: Box, names: tuple[str, ...]) -> tuple[SandboxInfo, ...]:
        if not names:
            raise Malformed("names: a fork makes at least 1 sandbox")
        with tenant.reserving("sandbox", tenant.boxes, self.limits.sandboxes, *names):
            held = Held(box.sandbox.fork(len(names)))
            try:
                forks = await held.value()
            except BaseException:
                await shielded(held.close())
                raise
            left = set(names)

            async def end(name: str, sandbox: Sandbox) -> None:
                try:
                    await sandbox.close()
                finally:
                    left.discard(name)
                    if not left:
                        await held.close()

            return tuple(
                self._keep(
                    tenant,
                    Box(name, sandbox, box.label, box.idle_s, partial(end, name, sandbox)),
                ).info()
                for name, sandbox in zip(names, forks, strict=True)
            )

    async def snapshot(self, tenant: Tenant, box: Box) -> tuple[str, Snapshot]:
        name = secrets.token_hex(8)
        with tenant.reserving("snapshot", tenant.snapshots, self.limits.snapshots, name):
            snapshot = await box.sandbox.snapshot()
            kept = tenant.snapshots[name] = KeptSnapshot(snapshot, self.limits.idle_s)
            self.note(kept)
            return name, snapshot

    async def commit(self, box: Box, template: str) -> Entry:
        """Keeps the workspace and sessions of a sandbox as a new template of the hub."""
        if self.hub is None:
            raise UnknownName("this service has no hub to commit to")
        folder = Path(tempfile.mkdtemp(prefix="commit-", dir=self.engine.scratch))
        try:
            snapshot = await box.sandbox.snapshot()
            try:
                await checkpoint(self.engine, snapshot, folder / "workspace.tar", max_bytes=self.limits.tree_bytes)
            finally:
                await snapshot.release()
            hub = self.hub
            return await shielded(asyncio.to_thread(hub.add_checkpoint, template, folder / "workspace.tar"))
        finally:
            await shielded(asyncio.to_thread(remove_tree, folder))

    def _keep(self, tenant: Tenant, box: Box) -> Box:
        tenant.boxes[box.name] = box
        self.note(box)
        return box

    def note(self, _: Kept) -> None:
        """Something new is kept, which may expire before all else."""
        self._made.set()

    def _idle_s(self, asked: float | None) -> float:
        if asked is not None and not asked > 0:
            raise Malformed(f"idle_s must be positive, got {asked}")
        return min(asked or self.limits.idle_s, self.limits.idle_s)

    @contextmanager
    def spec(self, tenant: Tenant, start: Start) -> Iterator[SandboxSpec]:
        """What the engine is asked for; what it stands on stays there while this is entered. No path of the host is
        ever taken from a request."""
        with ExitStack() as stack:
            yield self._spec(tenant, start, stack)

    def _spec(self, tenant: Tenant, start: Start, stack: ExitStack) -> SandboxSpec:
        if sum(map(bool, (start.template, start.snapshot, start.trees))) > 1:
            raise Malformed("template, snapshot and trees exclude one another")
        base: tuple[str, ...] | Snapshot = tuple(stack.enter_context(self.tree(tenant, tree)) for tree in start.trees)
        workdir, env, limits, sessions = "/app", dict[str, str](), Limits(), dict[str, bytes]()
        if start.snapshot is not None:
            kept = tenant.snapshots.get(start.snapshot)
            if kept is None:
                raise UnknownName(f"there is no snapshot {printable(start.snapshot)}: it was released")
            stack.enter_context(kept.using())
            base, workdir = kept.snapshot, kept.snapshot.workdir
        elif start.template is not None:
            if self.hub is None:
                raise UnknownName("this service has no hub, so there are no templates")
            template = stack.enter_context(self.hub.using(start.template))
            base, workdir, env = tuple(map(str, template.layers)), template.workdir, dict(template.env)
            limits, sessions = template.limits, dict(template.sessions)
        return SandboxSpec(
            base=base,
            image=start.image,
            workdir=start.workdir or workdir,
            env=env | start.env,
            limits=start.limits or limits,
            mounts=tuple(
                Mount(stack.enter_context(self.tree(tenant, mount.tree)), mount.target) for mount in start.mounts
            ),
            network=start.network,
            alarms=start.alarms,
            sessions=sessions | start.sessions,
            label=start.label,
        )

    @contextmanager
    def tree(self, tenant: Tenant, sha256: str) -> Iterator[str]:
        """Where a tree lies, in use meanwhile."""
        kept = tenant.trees.get(sha256)
        if kept is None:
            raise UnknownName(f"there is no tree {printable(sha256)}: upload it")
        with kept.using():
            yield str(kept.path)

    # -- time

    async def reap(self) -> None:
        """Closes what has been idle for too long, for as long as the house is open."""
        while True:
            self._made.clear()
            now = time.monotonic()
            next_at = now + self.limits.idle_s
            for tenant in self.tenants.values():
                for held, name, one in tenant.kept():
                    expires = one.expires
                    if expires is not None and expires <= now:
                        self._expire(tenant, held, name, one)
                    else:
                        next_at = min(next_at, expires if expires is not None else now + one.idle_s)
            try:
                async with asyncio.timeout(max(0.0, next_at - time.monotonic())):
                    await self._made.wait()
            except TimeoutError:
                pass

    def _expire(self, tenant: Tenant, held: dict[str, Kept], name: str, one: Kept) -> None:
        """Begins to close it, unless that was begun. One that is stuck holds up no other."""
        if one not in self._expiring:
            logger.info("%s of %s was idle for too long and is closed", name, tenant.name)
            self._expiring[one] = asyncio.ensure_future(tenant.discard_or_log(held, name))
            self._expiring[one].add_done_callback(lambda _: self._expiring.pop(one, None))

    async def close(self) -> None:
        """Ends all work and closes whatever is kept. What is stuck is named in the log and left to the engine."""
        work = [asyncio.ensure_future(tenant.close()) for tenant in self.tenants.values()]
        waited = [*work, *self._expiring.values()]
        if not waited:
            return
        done, stuck = await asyncio.wait(waited, timeout=_CLOSE_S)
        for task in stuck:
            task.cancel()
        for task in done:
            task.result()
        if stuck:
            names = [name for tenant in self.tenants.values() for _, name, _ in tenant.kept()]
            logger.error("not closed within %g s: %s", _CLOSE_S, ", ".join(names) or "requests")


@asynccontextmanager
async def open_house(
    engine: SandboxEngine, tenants: Mapping[str, str], limits: ServiceLimits, hub: Hub | None
) -> AsyncIterator[House]:
    """Closing it closes whatever its tenants still hold."""
    folder = engine.scratch / SHARED / secrets.token_hex(4)  # another service may have the same engine
    house = House(engine, tenants, limits, hub, folder)
    reaping = asyncio.ensure_future(house.reap())
    try:
        yield house
    finally:
        reaping.cancel()
        await asyncio.wait([reaping])
        await shielded(house.close())
        await shielded(asyncio.to_thread(_remove_folder, folder))
        if not reaping.cancelled():
            reaping.result()


def _remove_folder(folder: Path) -> None:
    remove_tree(folder)
    with contextlib.suppress(OSError):  # another service still has trees there
        folder.parent.rmdir()
