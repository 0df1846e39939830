"""A private copy of the user's directory in a local sandbox, compared and brought back (docs/adr/0008).

Three states of a path decide: `before` (as it was copied in), `after` (as the agent left it), `now` (as it is in the
user's directory). What the agent did not change is not touched; what both changed stays the user's; whatever the user
loses by a change is kept first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path, PurePosixPath

import msgspec

from ale.agent.events import Settled
from ale.agent.manifest import Entry, Manifest, Stamps, entry_at, stamps, take
from ale.agent.memory import FILE as MEMORY
from ale.agent.memory import FOLDER
from ale.agent.settings import SandboxSettings
from ale.agent.todo import FILE as TODO
from ale.errors import ConfigError, SandboxError
from ale.sandbox import Command, Limits, Mount, Network, Rule, Sandbox, SandboxSpec, open_engine
from ale.sandbox.port import RESERVED
from ale.sandbox.shielded import shielded

_MB = 1024 * 1024
_ELSEWHERE = "/workspace"
_SCRATCH = "/tmp/ale"
# What programs of the user run by themselves, or what decides about the next agent, at any depth: never brought back.
# A HEAD outside of .git would make any folder a repository, with settings and hooks of its own.
_WITHHELD = re.compile(
    r"(?:.*/)?(?:\.git/(?:.*/)?(?:hooks|config(?:\.worktree)?|commondir|info/attributes)|\.ale|ale\.toml|\.envrc)(?:/.*)?"
    r"|(?!(?:.*/)?\.git/)(?:.*/)?HEAD",
    re.DOTALL,
)
# The agent's own tools write these, in the user's directory.
_OWN_NOTES = (f"{FOLDER}/{TODO}", f"{FOLDER}/{MEMORY}")
_LOOK_SHARE = 0.05  # of the time, at most, goes into looking for changes outside
_COMMAND_S = 30.0


class CopiedWorkspace:
    """Made by `open_copied`."""

    isolated = True
    scratch = _SCRATCH

    def __init__(
        self, directory: Path, root: str, sandbox: Sandbox, before: Manifest, seen: Stamps, *, keep: Path, max_mb: int
    ) -> None:
        self.root, self.sandbox = root, sandbox
        self._directory, self._keep, self._max_bytes = directory, keep, max_mb * _MB
        self._before, self._seen = before, seen
        self._told: dict[str, Entry | None] = {}  # conflicts and what was withheld, as last reported
        self._next_look = 0.0

    # -- from the user to the agent

    async def refresh(self) -> tuple[str, ...]:
        if (started := time.monotonic()) < self._next_look:
            return ()
        try:
            seen = await asyncio.to_thread(stamps, self._directory)
        except OSError as error:
            raise SandboxError(f"the workspace {self._directory} cannot be read: {error}") from error
        self._next_look = time.monotonic() + (time.monotonic() - started) / _LOOK_SHARE
        changed = sorted(name for name in seen.keys() | self._seen.keys() if seen.get(name) != self._seen.get(name))
        # What goes, the deepest first, then what comes, the highest first.
        going = [name for name in reversed(changed) if name not in seen]
        order = (*going, *(name for name in changed if name in seen))
        told = [(name, await self._take_in(name)) for name in order]
        self._seen = seen  # now, so that what an interruption left out is taken in the next time
        return tuple(sorted(line for name, line in told if line is not None and name not in _OWN_NOTES))

    async def _take_in(self, name: str) -> str | None:
        try:
            return await self._compare(name)
        except OSError as error:
            return f"{name}: the user changed it, but it cannot be taken in: {error}"

    async def _compare(self, name: str) -> str | None:
        now, before = await asyncio.to_thread(self._now, name), self._before.get(name)
        if now == before:
            return None
        inside = await self._inside(name)
        if inside == now:
            self._note(name, now)
            return None
        if inside != before:
            return f"{name}: the user changed it, and so did you; theirs will stay"
        if before is not None and (now is None or before.kind != now.kind) and not await self._remove(name, before):
            return f"{name}: deleted by the user, but it holds what you made"
        if now is None:
            self._note(name, None)
            return f"{name}: deleted by the user"
        if now.kind == "other":
            return None
        if now.kind == "directory":
            await self._run("mkdir", "-p", "--", name)
        else:
            await self.sandbox.upload(self._directory / name, name)
        self._note(name, now)
        if now.kind == "directory":
            return None
        return f"{name}: {'changed' if before else 'added'} by the user"

    async def _inside(self, name: str) -> Entry | None:
        """What the agent has at `name`."""
        try:
            info = await self.sandbox.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if info.kind in ("directory", "other"):
            return Entry(info.kind)
        with tempfile.TemporaryDirectory(dir=self._keep) as folder:
            copy = Path(folder) / "copy"
            await self.sandbox.download(name, copy, max_bytes=self._max_bytes)
            return await asyncio.to_thread(entry_at, copy)

    async def _remove(self, name: str, before: Entry) -> bool:
        """Takes away what the user has no more; a folder only when it is empty, for the rest in it is the agent's."""
        argv = ("rmdir", "--", name) if before.kind == "directory" else ("rm", "-f", "--", name)
        return (await self.sandbox.exec(Command(argv=argv, timeout_s=_COMMAND_S))).ok

    async def _run(self, *argv: str) -> None:
        done = await self.sandbox.exec(Command(argv=argv, timeout_s=_COMMAND_S))
        if not done.ok:
            raise OSError(f"{' '.join(argv)}: {done.text('stderr').strip()}")

    # -- from the agent to the user

    async def settle(self) -> Settled:
        folder = Path(tempfile.mkdtemp(prefix="settled-", dir=self._keep))
        staging = folder / "staging"
        try:
            await self.sandbox.download(".", staging, max_bytes=self._max_bytes)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SandboxError(
                f"the agent's work cannot be brought back: {error}. {self._directory} is as it was; "
                f"agent.sandbox.workspace_mb bounds what is brought back ({self._max_bytes // _MB} now)."
            ) from error
        try:
            return await shielded(asyncio.to_thread(self._apply, staging, folder))
        except OSError as error:
            raise SandboxError(
                f"the agent's work was brought back in part only: {error}. All of it is in {staging}, and what it "
                f"replaced in {folder / 'former'}."
            ) from error

    def _apply(self, staging: Path, folder: Path) -> Settled:
        after = take(staging)
        changed = [name for name in after.keys() | self._before.keys() if after.get(name) != self._before.get(name)]
        applied: list[str] = []
        deleted: list[str] = []
        conflicts: list[str] = []
        withheld: list[str] = []
        # What goes, the deepest first, then what comes, the highest first.
        going = sorted((name for name in changed if name not in after), reverse=True)
        for name in (*going, *sorted(name for name in changed if name in after)):
            wanted, path = after.get(name), self._directory / name
            now = self._now(name)
            if now == wanted:
                self._note(name, wanted)
                continue
            if self._told.get(name, _NEVER) == wanted:
                continue
            if _WITHHELD.fullmatch(name) or not self._may_stand(name, wanted):
                withheld.append(name)
            elif now != self._before.get(name) or not self._has_place(name):
                conflicts.append(name)
            elif self._replace(path, staging / name, wanted, folder / "former" / name):
                self._note(name, wanted)
                if wanted is None:
                    deleted.append(name)
                elif wanted.kind != "directory" or now is not None:  # a new directory is told by what is in it
                    applied.append(name)
                continue
            else:
                conflicts.append(name)
            self._told[name] = wanted
            _copy(staging / name, folder / "agent" / name)
        shutil.rmtree(staging)
        kept = any(folder.iterdir())
        if not kept:
            folder.rmdir()
        return Settled(
            applied=tuple(applied),
            deleted=tuple(deleted),
            conflicts=tuple(conflicts),
            withheld=tuple(withheld),
            kept=str(folder) if kept else None,
        )

    def _replace(self, path: Path, source: Path, wanted: Entry | None, former: Path) -> bool:
        """Puts what the agent has in place, what was there kept. False: something of the user's is in the way."""
        directory = path.is_dir() and not path.is_symlink()
        if directory and (wanted is None or wanted.kind != "directory"):
            try:
                path.rmdir()  # it holds what the user made meanwhile, unless this works
            except OSError:
                return False
        elif os.path.lexists(path):
            _copy(path, former)
        if wanted is None:
            if not directory:
                path.unlink()
        elif wanted.kind == "directory":
            if os.path.lexists(path):
                path.unlink()
            path.mkdir()
            _give(path, path.parent.stat())
        else:
            owner = path.lstat() if os.path.lexists(path) else path.parent.stat()
            fresh = path.with_name(f".ale-{secrets.token_hex(8)}")
            try:
                shutil.copy2(source, fresh, follow_symlinks=False)
                if wanted.kind == "file" and path.is_file() and not path.is_symlink():
                    fresh.chmod(path.stat().st_mode & 0o666 | source.stat().st_mode & 0o111)
                _give(fresh, owner)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
        return True

    def _may_stand(self, name: str, wanted: Entry | None) -> bool:
        """A link out of the workspace would lead the user's own programs there, and a .git that is none leads git."""
        if wanted is None or wanted.kind == "directory":
            return True
        if wanted.kind == "other" or os.path.basename(name) == ".git":
            return False
        if wanted.kind == "file":
            return True
        down = list(itertools.dropwhile(lambda part: part == "..", PurePosixPath(wanted.digest).parts))
        if ".." in down:  # up from where another link may lead: the letters do not say where that is
            return False
        target = os.path.normpath(os.path.join(self.root, os.path.dirname(name), wanted.digest))
        if not PurePosixPath(target).is_relative_to(self.root):
            return False
        return not wanted.digest.startswith("/") or self.root == str(self._directory)

    def _now(self, name: str) -> Entry | None:
        """What the user has there; None also where the way there is no more, or leads elsewhere."""
        return entry_at(self._directory / name) if self._has_place(name) else None

    def _has_place(self, name: str) -> bool:
        """Whether every folder on the way is one, and no link."""
        folders = [self._directory.joinpath(*parents) for parents in _parents(name)]
        return all(folder.is_dir() and not folder.is_symlink() for folder in folders)

    def _note(self, name: str, entry: Entry | None) -> None:
        """Both sides have this now."""
        self._told.pop(name, None)
        if entry is None:
            self._before.pop(name, None)
        else:
            self._before[name] = entry


_NEVER = Entry("other", -1)


def _parents(name: str) -> list[tuple[str, ...]]:
    parts = PurePosixPath(name).parts
    return [parts[:count] for count in range(1, len(parts))]


def _give(path: Path, owner: os.stat_result) -> None:
    """As root, what is brought into somebody's directory is theirs."""
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _copy(source: Path, target: Path) -> None:
    if not os.path.lexists(source):
        return
    if source.is_dir() and not source.is_symlink():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


@asynccontextmanager
async def open_copied(directory: Path, settings: SandboxSettings, *, keep: Path) -> AsyncIterator[CopiedWorkspace]:
    """Copies `directory` into a sandbox; inside it has the same path where that is possible, else /workspace."""
    spec = _spec(directory, settings, keep)
    await asyncio.to_thread(keep.mkdir, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        try:
            # Read before it is copied: what the user writes in between is then a conflict, not lost.
            seen, before = await asyncio.to_thread(stamps, directory), await asyncio.to_thread(take, directory)
            odd = [name for name, entry in before.items() if entry.kind == "other"]
            if odd:  # sockets, pipes, devices: they stay where they are, and no sandbox takes them in
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=keep, ignore_cleanup_errors=True))
                await asyncio.to_thread(_copy_without, set(odd), directory, Path(folder) / "base")
                spec = msgspec.structs.replace(spec, base=(f"{folder}/base",))
        except OSError as error:
            raise SandboxError(f"the workspace {directory} cannot be read: {error}") from error
        for name in odd:
            del before[name]
        engine = await stack.enter_async_context(open_engine("local"))
        sandbox = await stack.enter_async_context(engine.start(spec))
        yield CopiedWorkspace(directory, spec.workdir, sandbox, before, seen, keep=keep, max_mb=settings.workspace_mb)
    with contextlib.suppress(OSError):
        await asyncio.to_thread(keep.rmdir)  # when nothing was kept


def _copy_without(left_out: set[str], directory: Path, target: Path) -> None:
    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if os.path.relpath(os.path.join(folder, name), directory) in left_out}

    shutil.copytree(directory, target, symlinks=True, ignore=ignored)


def _spec(directory: Path, settings: SandboxSettings, keep: Path) -> SandboxSpec:
    if keep.resolve().is_relative_to(directory):
        raise ConfigError(
            f"{directory} cannot be copied: the sessions of the agent lie in it. Name a project's directory with "
            "--directory, or have the sessions elsewhere by XDG_STATE_HOME."
        )
    root = _ELSEWHERE if str(directory) == "/" or directory.parts[1] in RESERVED else str(directory)
    mounts = []
    for source, target in settings.mounts.items():
        path = Path(source).expanduser()
        if not path.exists():
            raise ConfigError(f"agent.sandbox.mounts: there is no {path}.")
        mounts.append((str(path), target))
    try:
        rules = tuple(Rule(host=host) for host in settings.network)
        return SandboxSpec(
            base=(str(directory),),
            workdir=root,
            env=settings.env,
            limits=Limits(
                memory_mb=settings.memory_mb,
                pids=settings.pids,
                file_mb=settings.file_mb,
                tmp_mb=settings.file_mb,
                output_bytes=_MB,
            ),
            mounts=tuple(Mount(source, target) for source, target in mounts),
            network=Network(mode="allow", rules=rules) if rules else Network(),
            label="agent",
        )
    except ValueError as error:
        raise ConfigError(f"agent.sandbox: {error}.") from error
