"""What one token holds: its sandboxes, snapshots, trees and environments, each with the time it was last used."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from ale.sandbox.held import Held
from ale.sandbox.port import Command, Completed, Sandbox, Snapshot, Terminal
from ale.sandbox.shielded import shielded
from ale.sandbox.transfer import remove
from ale.sandbox.wire import (
    NAME,
    Conflict,
    Logged,
    Malformed,
    SandboxInfo,
    Seen,
    TooLarge,
    TooMany,
    UnknownName,
    printable,
)
from ale.service.ledger import Ledger
from ale.service.room import Room

T = TypeVar("T", bound="Kept")

logger = logging.getLogger(__name__)

_LOGGED = 1000
_LINE_CHARS = 400


class ServiceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one token may hold, and for how long."""

    sandboxes: int = 64
    environments: int = 64
    snapshots: int = 256
    terminals: int = 16
    """Of one sandbox."""
    trees: int = 1024
    """Uploaded, to start sandboxes on."""
    tree_bytes: int = 8 << 30
    """Uploaded trees together; also the largest upload into a sandbox and the largest download from one."""
    body_bytes: int = 32 << 20
    """A request that is not a tree. It bounds `stdin` and files that are written in one piece."""
    bodies_bytes: int = 256 << 20
    """The bodies of the requests that run, together. One for which there is no room waits, half a minute at most."""
    transfers: int = 16
    """Trees on their way into sandboxes and out of them; each takes as much scratch on disk as it has."""
    idle_s: float = 1800.0
    """What nothing was asked of for so long is closed."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"ServiceLimits.{name} must be positive, got {getattr(self, name)}")


class Kept(ABC):
    """Something of a tenant that is closed when it has been idle for too long."""

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self.made = self.touched = time.monotonic()
        self.busy = 0

    @contextmanager
    def using(self) -> Iterator[None]:
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.touched = time.monotonic()

    @property
    def expires(self) -> float | None:
        """On the monotonic clock; None while it is in use."""
        return None if self.busy else self.touched + self.idle_s

    @abstractmethod
    async def close(self) -> None: ...


class KeptSnapshot(Kept):
    def __init__(self, snapshot: Snapshot, idle_s: float) -> None:
        super().__init__(idle_s)
        self.snapshot = snapshot

    async def close(self) -> None:
        await self.snapshot.release()


class KeptTree(Kept):
    def __init__(self, path: Path, size: int, idle_s: float) -> None:
        super().__init__(idle_s)
        self.path, self.size = path, size

    async def close(self) -> None:
        await shielded(asyncio.to_thread(remove, self.path))


class Box(Kept):
    """A sandbox. `end` closes it, and is awaited by everybody who closes it."""

    def __init__(
        self, name: str, sandbox: Sandbox, label: str, idle_s: float, end: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(idle_s)
        self.name, self.sandbox, self.label = name, sandbox, label
        self.closed = False
        self.log: deque[Logged] = deque(maxlen=_LOGGED)
        self.terminals: dict[str, Held[Terminal]] = {}
        self._end = end

    async def exec(self, command: Command, session: str | None) -> Completed:
        began, at = time.monotonic(), time.time()
        line = command.shell if command.shell is not None else shlex.join(command.argv or ())
        entry = Logged(at=at, line=printable(line[:_LINE_CHARS]))
        try:
            target = self.sandbox if session is None else self.sandbox.session(session)
            done = await target.exec(command)
            entry = msgspec.structs.replace(
                entry,
                exit_code=done.exit_code,
                signal=done.signal,
                timed_out=done.timed_out,
                duration_s=time.monotonic() - began,
            )
        finally:
            self.log.append(entry)
        return done

    def seen(self, since: int = 0) -> Seen:
        sandbox = self.sandbox
        return Seen(
            since=since,
            events=tuple(sandbox.audit()[since:]),
            alarms=tuple(sandbox.alarms()),
            statistics=sandbox.statistics(),
        )

    def info(self, since: int = 0) -> SandboxInfo:
        now, expires = time.monotonic(), self.expires
        return SandboxInfo(
            name=self.name,
            id=self.sandbox.id,
            label=self.label,
            busy=self.busy,
            age_s=now - self.made,
            idle_s=0.0 if self.busy else now - self.touched,
            expires_in_s=None if expires is None else max(0.0, expires - now),
            seen=self.seen(since),
        )

    async def close(self) -> None:
        self.closed = True
        try:
            await asyncio.gather(*(held.close() for held in list(self.terminals.values())), return_exceptions=True)
        finally:
            await self._end()


class Tenant:
    """Everything under one token. Nothing here is ever looked up by another."""

    def __init__(self, name: str, folder: Path, limits: ServiceLimits) -> None:
        self.name, self.folder, self.limits = name, folder, limits
        self.ledger = Ledger()
        self.boxes: dict[str, Box] = {}
        self.snapshots: dict[str, KeptSnapshot] = {}
        self.trees: dict[str, KeptTree] = {}
        self.environments: dict[str, Kept] = {}
        self._reserved: set[tuple[str, str]] = set()
        self._tree_bytes_promised = 0
        self.bodies = Room(limits.bodies_bytes)
        self._transfers = 0

    @contextmanager
    def reserving(self, kind: str, held: dict[str, T], limit: int, *names: str) -> Iterator[None]:
        """Takes places and names for what is being made. Raises Malformed, Conflict and TooMany."""
        for name in names:
            if not NAME.fullmatch(name):
                raise Malformed(f"{name!r} is no name of a {kind}: it must match {NAME.pattern}")
            if name in held or (kind, name) in self._reserved:
                raise Conflict(f"there is a {kind} called {name} already")
        taken = {(kind, name) for name in names}
        if len(taken) != len(names):
            raise Conflict(f"a {kind} is named twice")
        if len(held) + sum(one == kind for one, _ in self._reserved) + len(names) > limit:
            raise TooMany(f"this token may hold at most {limit} of the kind {kind}: close some")
        self._reserved |= taken
        try:
            yield
        finally:
            self._reserved -= taken

    @contextmanager
    def reserving_bytes(self, size: int) -> Iterator[None]:
        held = sum(tree.size for tree in self.trees.values()) + self._tree_bytes_promised
        if held + size > self.limits.tree_bytes:
            raise TooLarge(f"trees of {held} bytes are held, at most {self.limits.tree_bytes} are allowed")
        self._tree_bytes_promised += size
        try:
            yield
        finally:
            self._tree_bytes_promised -= size

    @contextmanager
    def transferring(self) -> Iterator[None]:
        if self._transfers >= self.limits.transfers:
            raise TooMany(f"this token has {self._transfers} transfers of trees under way: wait for some")
        self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1

    @contextmanager
    def box(self, name: str) -> Iterator[Box]:
        """The sandbox of that name, in use meanwhile."""
        box = self.boxes.get(name)
        if box is None or box.closed:
            raise UnknownName(f"there is no sandbox {printable(name)}: it is closed or was never here")
        with box.using():
            yield box

    @contextmanager
    def terminal(self, box: str, name: str) -> Iterator[Held[Terminal]]:
        try:
            with self.box(box) as one:
                held = one.terminals.get(name)
                if held is None:
                    raise UnknownName(f"there is no terminal {printable(name)}")
                yield held
        except UnknownName as error:
            raise UnknownName(f"the terminal was lost: {error}") from error

    def kept(self) -> Iterator[tuple[dict[str, Kept], str, Kept]]:
        """Everything that is held: where, under which name, and itself."""
        for held in (self.environments, self.boxes, self.snapshots, self.trees):
            for name, one in list(held.items()):
                yield held, name, one  # type: ignore[misc]  # of one kind each; only removed from

    async def discard(self, held: dict[str, T], name: str) -> None:
        """Closes what has that name; nothing of it is left when this returns. Idempotent, and safe to call twice at
        once."""
        one = held.get(name)
        if one is not None:
            try:
                await shielded(one.close())
            finally:
                if held.get(name) is one:
                    del held[name]

    async def close(self) -> None:
        await self.ledger.close()
        await asyncio.gather(*(self.discard_or_log(held, name) for held, name, _ in self.kept()))

    async def discard_or_log(self, held: dict[str, T], name: str) -> None:
        """`discard` where nobody asked, so that nobody can be told."""
        try:
            await self.discard(held, name)
        except Exception:
            logger.exception("closing %s of %s failed", name, self.name)
