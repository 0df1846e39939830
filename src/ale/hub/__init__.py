"""The hub: a local registry of what environments begin as, named, hashed by content, stored once.

    hub = Hub.default()
    hub.add_template("python-3", [Path("layers/python"), Path("layers/project")], workdir="/app")
    hub.add_tasks("copy-tasks", Path("tasks"))          # then: tasks.source = "hub:copy-tasks"
    SandboxSpec(base=tuple(map(str, hub.template("python-3").layers)))

    entries/NAME.json    what a name stands for; its hash covers all of it
    trees/, files/       the content (`ale.hub.trees`)
    starts/NAME.json     how long a template took to start here, when it was measured

A hash covers names, kinds, modes and contents; not times, which are all `EPOCH`. Nothing in a tree is ever changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ale.errors import HubError
from ale.hub.trees import EPOCH, File, Freed, TreeStore, write_whole
from ale.sandbox.checkpoint import unpacked
from ale.sandbox.port import Command, Limits, SandboxEngine, SandboxSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

Kind = Literal["template", "tasks"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a name stands for."""

    name: str
    kind: Kind
    sha256: str
    """Of everything below but the time."""
    trees: tuple[str, ...]
    """For a template its layers, the lowest first; for a task pack one directory of task directories."""
    workdir: str = "/app"
    env: dict[str, str] = {}
    limits: Limits = Limits()
    sessions: dict[str, bytes] = {}
    added_at: float = 0.0


class Template(msgspec.Struct, frozen=True, kw_only=True):
    layers: tuple[Path, ...]
    workdir: str
    env: dict[str, str]
    limits: Limits
    sessions: dict[str, bytes]


class Starts(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds to the first command's end: on an engine that has not seen the template, and on one that has."""

    sha256: str
    cold_ms: float
    cached_ms: float


class Hub:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries, self._starts = root / "entries", root / "starts"
        self._trees = TreeStore(root)

    @classmethod
    def default(cls) -> Hub:
        """Where ALE_HUB says, else in the user's data directory."""
        if given := os.environ.get("ALE_HUB"):
            return cls(Path(given))
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return cls(Path(data) / "ale" / "hub")

    # -- adding

    def add_template(
        self,
        name: str,
        layers: Sequence[Path],
        *,
        workdir: str = "/app",
        env: dict[str, str] | None = None,
        limits: Limits | None = None,
        sessions: dict[str, bytes] | None = None,
        replace: bool = False,
    ) -> Entry:
        """Adds directories, the lowest first, as what sandboxes start from. Raises HubError."""
        SandboxSpec(workdir=workdir, env=env or {})  # what it would refuse is refused here
        with self._changing(name, replace):
            trees = tuple(self._trees.add(layer, "") for layer in layers)
            return self._enter(
                Entry(
                    name=name,
                    kind="template",
                    sha256="",
                    trees=trees,
                    workdir=workdir,
                    env=env or {},
                    limits=limits or Limits(),
                    sessions=sessions or {},
                )
            )

    def add_checkpoint(self, name: str, archive: Path, *, replace: bool = False) -> Entry:
        """Adds the workspace and sessions of a checkpoint as a template. Raises HubError and SandboxError."""
        with tempfile.TemporaryDirectory(prefix="ale-hub-") as folder:
            tree = Path(folder) / "tree"
            manifest, sessions = unpacked(archive, tree)
            return self.add_template(name, [tree], workdir=manifest.workdir, sessions=sessions, replace=replace)

    def add_tasks(self, name: str, directory: Path, *, replace: bool = False) -> Entry:
        """Adds a task directory, or a directory of them. Whether they load is the caller's to check."""
        one = (directory / "task.toml").exists()
        with self._changing(name, replace):
            tree = self._trees.add(directory, directory.resolve().name if one else "")
            return self._enter(Entry(name=name, kind="tasks", sha256="", trees=(tree,)))

    def remove(self, name: str) -> None:
        """Forgets a name; `gc` frees what only it stood for."""
        with self._locked():
            if self._path_of(name).exists():  # one that is damaged too
                self._path_of(name).unlink()
            else:
                self.entry(name)
            (self._starts / f"{name}.json").unlink(missing_ok=True)

    # -- looking up

    def entries(self) -> list[Entry]:
        """What can be read; `damaged` says what cannot."""
        return self._read()[0]

    def damaged(self) -> list[str]:
        """Why entries cannot be read, a paragraph each."""
        return self._read()[1]

    def _read(self) -> tuple[list[Entry], list[str]]:
        sound: list[Entry] = []
        damaged: list[str] = []
        for path in sorted(self._entries.glob("*.json")):
            try:
                sound.append(self.entry(path.stem))
            except HubError as error:
                damaged.append(str(error))
        return sound, damaged

    def _path_of(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise HubError(f"{name!r} is no name: use letters, digits, '.', '_' and '-'.")
        return self._entries / f"{name}.json"

    def entry(self, name: str) -> Entry:
        path = self._path_of(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise HubError(f"The hub {self.root} has no {name}; `ale hub list` says what it has.") from None
        try:
            return msgspec.json.decode(data, type=Entry)
        except msgspec.MsgspecError as error:
            raise HubError(
                f"{path} is damaged: {error}. Add it again with --replace, or `ale hub remove {name}`."
            ) from error

    def template(self, name: str) -> Template:
        """What a name stands for now. Its layers are not collected for as long as this process runs."""
        entry = self._of_kind(name, "template")
        return _template(entry, map(self._trees.keep, entry.trees))

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Template]:
        """The same for a process that lives long: its layers are not collected while this is entered."""
        entry = self._of_kind(name, "template")
        with contextlib.ExitStack() as stack:
            yield _template(entry, [stack.enter_context(self._trees.using(tree)) for tree in entry.trees])

    def tasks(self, name: str) -> Path:
        """The directory of task directories that a task pack is; not collected for as long as this process runs."""
        return self._trees.keep(self._of_kind(name, "tasks").trees[0])

    def files(self, tree: str) -> list[File]:
        """What a tree of an entry holds, each directory before what is in it. Raises HubError."""
        return self._trees.files(tree)

    def _of_kind(self, name: str, kind: Kind) -> Entry:
        entry = self.entry(name)
        if entry.kind != kind:
            raise HubError(f"{name} in the hub is {_SAID[entry.kind]}, and {_SAID[kind]} is needed here.")
        return entry

    # -- care

    def verify(self, name: str | None = None) -> list[str]:
        """Reads everything (of one name) again; what is not as it was added, a line each."""
        names = [name] if name is not None else [path.stem for path in sorted(self._entries.glob("*.json"))]
        wrong: list[str] = []
        looked: set[str] = set()
        for one in names:
            try:
                entry = self.entry(one)
            except HubError as error:
                wrong.append(str(error))
                continue
            if entry.sha256 != _hash_of(entry):
                wrong.append(f"{one}: its entry does not have the hash that it claims")
            for tree in entry.trees:
                if tree not in looked:
                    looked.add(tree)
                    wrong += [f"{one}: {said}" for said in self._trees.verify(tree)]
        return wrong

    def gc(self) -> Freed:
        """Deletes what no name stands for."""
        with self._locked():
            entries, damaged = self._read()
            if damaged:  # it cannot be known which trees they stand for
                raise HubError(f"Nothing was deleted: {damaged[0]}")
            return self._trees.collect({tree for entry in entries for tree in entry.trees})

    # -- starts

    def starts(self, name: str) -> Starts | None:
        """What `measure` found for the present content of a template; None: not measured."""
        try:
            found = msgspec.json.decode((self._starts / f"{name}.json").read_bytes(), type=Starts)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return found if found.sha256 == self.entry(name).sha256 else None

    async def measure(self, name: str, engine: SandboxEngine) -> Starts:
        """Starts a template twice on an engine that was just opened, and keeps how long each took."""
        took = []
        with self.using(name) as template:
            spec = SandboxSpec(
                base=tuple(map(str, template.layers)),
                workdir=template.workdir,
                env=template.env,
                limits=template.limits,
                label="hub",
            )
            for _ in range(2):
                began = time.perf_counter()
                async with engine.start(spec) as sandbox:
                    await sandbox.exec(Command(shell="true"))
                    took.append(1000 * (time.perf_counter() - began))
        measured = Starts(sha256=self.entry(name).sha256, cold_ms=took[0], cached_ms=took[1])
        write_whole(self._starts / f"{name}.json", msgspec.json.encode(measured))
        return measured

    # -- storing

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, by whichever process."""
        try:
            self._trees.make()
            for folder in (self._entries, self._starts):
                folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HubError(f"The hub {self.root} cannot be written: {error}. ALE_HUB chooses another place.") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _changing(self, name: str, replace: bool) -> Iterator[None]:
        if not _NAME.fullmatch(name):
            raise HubError(f"{name!r} is no name: use letters, digits, '.', '_' and '-'.")
        with self._locked():
            if not replace and (self._entries / f"{name}.json").exists():
                raise HubError(f"The hub has {name} already; --replace puts this in its place.")
            try:
                yield
            except OSError as error:
                raise HubError(f"{name} cannot be added to the hub: {error}.") from error

    def _enter(self, entry: Entry) -> Entry:
        entry = msgspec.structs.replace(entry, sha256=_hash_of(entry), added_at=time.time())
        write_whole(self._entries / f"{entry.name}.json", msgspec.json.format(msgspec.json.encode(entry)))
        return entry


_SAID: dict[Kind, str] = {"template": "a template", "tasks": "a task pack"}


def _template(entry: Entry, layers: Iterable[Path]) -> Template:
    return Template(
        layers=tuple(layers),
        workdir=entry.workdir,
        env=entry.env,
        limits=entry.limits,
        sessions=entry.sessions,
    )


def _hash_of(entry: Entry) -> str:
    bare = msgspec.structs.replace(entry, name="", sha256="", added_at=0.0)
    return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()


__all__ = ["EPOCH", "Entry", "File", "Freed", "Hub", "Starts", "Template"]
