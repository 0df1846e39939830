"""Trees: directories that are named after a hash of their content, each content on disk once.

trees/SHA256/        a directory as it was added; SHA256.json lists its content and hashes to SHA256
                     whoever reads the tree holds a shared lock on that list, and `collect` leaves it alone
files/SHA256.MODE    each content once: the files of all trees are hard links to these
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Literal

import msgspec

from ale.errors import HubError
from ale.sandbox.launcher import remove_tree

EPOCH = 315532800  # 1980: the earliest time that every archive format can hold
_BLOCK_BYTES = 1 << 20


class File(msgspec.Struct, frozen=True, array_like=True):
    """One line of a tree: `File("f", "bin/run", 0o755, 12, "9f86d0...")`; a link's target is its content."""

    kind: Literal["d", "f", "l"]
    path: str
    mode: int
    size: int
    sha256: str


class Freed(msgspec.Struct, frozen=True):
    trees: int
    files: int
    bytes: int
    in_use: int = 0
    """Trees that no name stands for, which somebody reads at this moment: the next time."""


class TreeStore:
    """Nothing in a tree is ever changed. Whoever adds or collects holds the hub's lock."""

    def __init__(self, root: Path) -> None:
        self._trees, self._files = root / "trees", root / "files"

    def make(self) -> None:
        for folder in (self._trees, self._files):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, tree: str) -> Path:
        path = self._trees / tree
        if not path.is_dir():
            raise HubError(f"{path} is missing: `ale hub verify` says what else is; add it again.")
        return path

    @contextlib.contextmanager
    def using(self, tree: str) -> Iterator[Path]:
        """The tree's directory, which is not collected meanwhile, by whichever process. Raises HubError."""
        fd = self._lease(tree)
        try:
            yield self.path(tree)
        finally:
            os.close(fd)

    def keep(self, tree: str) -> Path:
        """The tree's directory, which is not collected for as long as this process runs. Raises HubError."""
        listed = str(self._trees / f"{tree}.json")
        if listed not in _kept:
            _kept[listed] = self._lease(tree)
        return self.path(tree)

    def _lease(self, tree: str) -> int:
        path = self._trees / f"{tree}.json"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise HubError(f"{path} is missing: add what it belonged to again.") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise HubError(f"{path} is being deleted by `ale hub gc`: no name stood for it.") from None
        if not os.fstat(fd).st_nlink:  # deleted between the two, so that the lock is on nothing
            os.close(fd)
            raise HubError(f"{path} was deleted by `ale hub gc`: no name stood for it. Add it again.")
        return fd

    def files(self, tree: str) -> list[File]:
        """What a tree holds, by path. Raises HubError when its list is missing or damaged."""
        path = self._trees / f"{tree}.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise HubError(f"{path} is missing: add what it belonged to again.") from None
        if hashlib.sha256(data).hexdigest() != tree:
            raise HubError(f"{path} does not have the hash in its name: it was changed. Add it again.")
        return msgspec.json.decode(data, type=list[File])

    def add(self, source: Path, prefix: str) -> str:
        """Takes a directory in, below `prefix`; its hash. What is there already, and sound, is not stored again."""
        if not source.is_dir():
            raise HubError(f"There is no directory {source}.")
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=self._trees))
        try:
            listed = list(_scan(source, prefix, self._take_in))
            data = msgspec.json.encode(listed)
            tree = hashlib.sha256(data).hexdigest()
            path = self._trees / f"{tree}.json"
            if not path.exists() or path.read_bytes() != data:  # else whoever reads the tree has a lock on this file
                write_whole(path, data)
            if (self._trees / tree).is_dir() and self.verify(tree):
                remove_tree(self._trees / tree)
            if not (self._trees / tree).is_dir():
                self._lay_out(unfinished / "tree", listed, source, prefix)
                (unfinished / "tree").rename(self._trees / tree)
            return tree
        finally:
            remove_tree(unfinished)

    def _take_in(self, fd: int, mode: int) -> str:
        """Keeps the content of an open file, once for each mode; its hash."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self._trees, prefix="unfinished-", delete=False) as copy:
            try:
                while block := os.read(fd, _BLOCK_BYTES):
                    digest.update(block)
                    copy.write(block)
                copy.flush()
                os.fchmod(copy.fileno(), mode)
                os.utime(copy.name, (EPOCH, EPOCH))
                target = self._files / f"{digest.hexdigest()}.{mode:o}"
                if not _holds(target, digest.digest()):
                    os.rename(copy.name, target)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(copy.name)
        return digest.hexdigest()

    def _lay_out(self, target: Path, listed: list[File], source: Path, prefix: str) -> None:
        for file in listed:
            path = target / file.path
            match file.kind:
                case "d":
                    path.mkdir()
                case "f":
                    self._link(self._files / f"{file.sha256}.{file.mode:o}", path)
                case "l":
                    aim = os.readlink(source / Path(file.path).relative_to(prefix))
                    if hashlib.sha256(os.fsencode(aim)).hexdigest() != file.sha256:
                        raise HubError(f"{source}: {file.path} changed while it was added; add it again.")
                    path.symlink_to(aim)
                    os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
        for file in reversed(listed):
            if file.kind == "d":
                (target / file.path).chmod(file.mode)
                os.utime(target / file.path, (EPOCH, EPOCH))

    def _link(self, content: Path, path: Path) -> None:
        """A file system bounds the links to one file (ext4: 65,000), and an empty file is in every package: then a copy
        takes the place of the content, which goes on in the trees that have it."""
        try:
            os.link(content, path)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            fresh = content.with_name(f".{content.name}")
            shutil.copy2(content, fresh)
            fresh.replace(content)
            os.link(content, path)

    def verify(self, tree: str) -> list[str]:
        """What is not as it was added, a line each."""
        try:
            expected = {file.path: file for file in self.files(tree)}
            found = {file.path: file for file in _scan(self.path(tree), "")}
        except (HubError, OSError) as error:
            return [str(error)]
        wrong = [f"{path!r} is missing from tree {tree[:12]}" for path in expected.keys() - found.keys()]
        wrong += [f"{path!r} was added to tree {tree[:12]}" for path in found.keys() - expected.keys()]
        wrong += [
            f"{path!r} in tree {tree[:12]} was changed"
            for path in expected.keys() & found.keys()
            if expected[path] != found[path]
        ]
        return sorted(wrong)

    def collect(self, used: Set[str]) -> Freed:
        """Deletes every other tree unless somebody reads it, contents that no tree links to, and what a killed `add`
        left."""
        unused = [path for path in self._trees.glob("*") if path.name.removesuffix(".json") not in used]
        listed = {path.stem for path in unused if path.suffix == ".json"}
        deleted = sum(map(self._delete, sorted(listed)))
        left = [path for path in unused if path.suffix != ".json" and path.name not in listed]
        for path in left:
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink()
        files = freed = 0
        for path in self._files.glob("*"):
            info = path.lstat()
            if info.st_nlink == 1:
                files, freed = files + 1, freed + info.st_size
                path.unlink()
        return Freed(deleted + len(left), files, freed, len(listed) - deleted)

    def _delete(self, tree: str) -> bool:
        """Whether it is gone now; False: somebody reads it."""
        path = self._trees / f"{tree}.json"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self._trees / tree).is_dir():
                remove_tree(self._trees / tree)
            path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


# Locked lists of the trees that this process goes on reading: they are unlocked with its end.
_kept: dict[str, int] = {}


def _holds(path: Path, sha256: bytes) -> bool:
    """Whether a file is there with that content: a damaged one is not linked to again."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == sha256
    except FileNotFoundError:
        return False


def _hash_file(fd: int, mode: int) -> str:
    digest = hashlib.sha256()
    while block := os.read(fd, _BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _scan(root: Path, prefix: str, content: Callable[[int, int], str] = _hash_file) -> Iterator[File]:
    """A directory as `File`s, each directory before what is in it, names sorted. Links are not followed.

    Owners may always read their files and use their directories; set-id bits are dropped. Raises OSError and HubError.
    """
    yield File("d", "", 0o755 if prefix else _mode(root.lstat()), 0, "")
    if prefix:
        yield File("d", prefix, _mode(root.lstat()), 0, "")
    todo = [(root, prefix)]
    while todo:
        folder, inside = todo.pop()
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            try:
                path.encode()
            except UnicodeEncodeError:
                raise HubError(f"{os.fsencode(entry.path)!r}: names in the hub are UTF-8; rename it.") from None
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                target = os.fsencode(os.readlink(entry.path))
                yield File("l", path, 0o777, len(target), hashlib.sha256(target).hexdigest())
            elif stat.S_ISDIR(info.st_mode):
                yield File("d", path, _mode(info), 0, "")
                todo.append((folder / entry.name, path))
            elif stat.S_ISREG(info.st_mode):
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    yield File("f", path, _mode(info), os.fstat(fd).st_size, content(fd, _mode(info)))
                finally:
                    os.close(fd)
            else:
                raise HubError(f"{entry.path} is neither file, directory nor link; the hub keeps nothing else.")


def _mode(info: os.stat_result) -> int:
    return stat.S_IMODE(info.st_mode) & 0o777 | (0o700 if stat.S_ISDIR(info.st_mode) else 0o400)


def write_whole(path: Path, data: bytes) -> None:
    """Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)
