"""Files and trees as bytes: written by one side of a stream, read by the other, neither holding more than a piece.

    entry = kind u8 (d, f, l) | mode u16 | mtime u64 ns | size u64 | path length u16 | path | size bytes
    end   = "e" | skipped u32                          little-endian; what is neither d, f nor l is skipped and counted

Paths are relative to the root, "" for the root itself, which comes first. A directory comes before what is in it, and
names in a directory come sorted: equal trees give equal bytes, times apart. The size bytes are the content of a file
(of a file that changes meanwhile: that many bytes, as with tar) or the target of a link.
"""

import posix

from .files import kind_of, make_parents
from .wire import PIECE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

MAX_ENTRIES = 1_000_000
MAX_PATH_BYTES = 4096
_HEADER = 1 + 2 + 8 + 8 + 2
_EINVAL, _EFBIG = 22, 27
_READ = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_NOCTTY
_CREATE = posix.O_WRONLY | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NOCTTY | posix.O_EXCL


class Entry:
    __slots__ = ("kind", "mode", "mtime_ns", "path", "size")

    def __init__(self, kind: bytes, mode: int, mtime_ns: int, size: int, path: bytes) -> None:
        self.kind, self.mode, self.mtime_ns, self.size, self.path = kind, mode, mtime_ns, size, path

    def header(self) -> bytes:
        numbers = ((self.mode, 2), (max(self.mtime_ns, 0), 8), (self.size, 8), (len(self.path), 2))
        return self.kind + b"".join(value.to_bytes(width, "little") for value, width in numbers) + self.path


def end_of_tree(skipped: int) -> bytes:
    return b"e" + skipped.to_bytes(4, "little")


def pack_tree(root: bytes, *, strict: bool) -> "Iterator[bytes]":
    """The bytes of a file or tree, in pieces of at most PIECE_BYTES but for the last, which has up to five more.

    Raises OSError as it goes. `strict`: refuses what is neither file, directory nor link, and takes no right that it
    has not; otherwise that is skipped, and a mode that keeps its own owner out does not keep the owner out.
    """
    gathered = bytearray()  # small entries share a piece
    skipped = 0
    todo = [b""]
    while todo:
        path = todo.pop()
        full = root + b"/" + path if path else root
        try:
            info = posix.lstat(full)
        except FileNotFoundError:
            if not path:
                raise
            continue  # removed meanwhile
        kind = kind_of(info.st_mode)
        entry = Entry(kind, info.st_mode & 0o7777, info.st_mtime_ns, 0, path)
        if kind == b"d":
            gathered += entry.header()
            needed = 0 if strict else 0o500
            names = sorted(_as_owner(full, info.st_mode, needed, posix.listdir), reverse=True)
            todo += [path + b"/" + name if path else name for name in names]
        elif kind == b"l":
            target = posix.readlink(full)
            entry.size = len(target)
            gathered += entry.header() + target
        elif kind == b"f":
            fd = _as_owner(full, info.st_mode, 0 if strict else 0o400, lambda name: posix.open(name, _READ))
            try:
                entry.size = left = posix.fstat(fd).st_size
                gathered += entry.header()
                while left:
                    block = posix.read(fd, min(left, PIECE_BYTES - len(gathered) % PIECE_BYTES))
                    if not block:
                        block = bytes(min(left, PIECE_BYTES))  # it has shrunk
                    left -= len(block)
                    gathered += block
                    while len(gathered) >= PIECE_BYTES:
                        yield bytes(gathered[:PIECE_BYTES])
                        del gathered[:PIECE_BYTES]
            finally:
                posix.close(fd)
        elif strict:
            raise OSError(_EINVAL, "neither file, directory nor symbolic link", full)
        else:
            skipped += 1
        while len(gathered) >= PIECE_BYTES:
            yield bytes(gathered[:PIECE_BYTES])
            del gathered[:PIECE_BYTES]
    yield bytes(gathered) + end_of_tree(skipped)


def _as_owner(path: bytes, mode: int, needed: int, use: "Callable[[bytes], Any]") -> "Any":
    """`use(path)`, with the rights that an owner may give itself where it has withdrawn them."""
    try:
        return use(path)
    except PermissionError:
        if not needed:
            raise
        posix.chmod(path, mode & 0o7777 | needed)
        try:
            return use(path)
        finally:
            posix.chmod(path, mode & 0o7777)


class TreeReader:
    """Bytes in; entries and, after each, its content in blocks out. Raises ValueError at what no tree holds."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.left = 0  # of the present entry's content
        self.entries = 0
        self.skipped: int | None = None
        """Set at the end of the tree."""

    def feed(self, data: bytes) -> "Iterator[Entry | bytes]":
        self.buffer += data
        while self.buffer:
            if self.skipped is not None:
                raise ValueError("bytes after the end of the tree")
            if self.left:
                block = bytes(self.buffer[: self.left])
                del self.buffer[: len(block)]
                self.left -= len(block)
                yield block
                continue
            if self.buffer[:1] == b"e":
                if len(self.buffer) < 5:
                    return
                self.skipped = int.from_bytes(self.buffer[1:5], "little")
                del self.buffer[:5]
                continue
            if len(self.buffer) < _HEADER:
                return
            length = int.from_bytes(self.buffer[_HEADER - 2 : _HEADER], "little")
            if len(self.buffer) < _HEADER + length:
                return
            entry = self._entry(bytes(self.buffer[: _HEADER + length]))
            del self.buffer[: _HEADER + length]
            self.left = entry.size
            yield entry

    def _entry(self, data: bytes) -> Entry:
        kind, path = data[:1], data[_HEADER:]
        mode, mtime_ns, size = (int.from_bytes(data[a:b], "little") for a, b in ((1, 3), (3, 11), (11, 19)))
        if kind not in (b"d", b"f", b"l") or mode > 0o7777 or mtime_ns >= 1 << 63:
            raise ValueError("an entry that is none")
        if (kind == b"d" and size) or (kind == b"l" and not 0 < size <= MAX_PATH_BYTES):
            raise ValueError("an entry of an impossible size")
        parts = path.split(b"/")
        if path and (len(path) > MAX_PATH_BYTES or b"\0" in path or any(part in (b"", b".", b"..") for part in parts)):
            raise ValueError("a path that leads out of the tree")
        if (self.entries == 0) != (path == b""):
            raise ValueError("a tree begins with its root, once")
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES} entries")
        return Entry(kind, mode, mtime_ns, size, path)


class TreeWriter:
    """Lays a tree out on disk as its bytes come in. The bytes may be hostile: nothing outside `root` is touched,
    provided that nobody else changes `root` meanwhile.

    `fresh`: root must not exist, and every path is made once. Otherwise what is there is written over. Raises OSError,
    or ValueError at what no tree holds. Set-id bits are dropped.
    """

    def __init__(self, root: bytes, max_bytes: int, *, fresh: bool) -> None:
        self.root, self.room, self.fresh = root, max_bytes, fresh
        self.reader = TreeReader()
        self.directories: dict[bytes, Entry] = {}
        self.entry: Entry | None = None
        self.fd = -1
        self.target = b""
        self.left = 0

    def feed(self, data: bytes) -> None:
        for part in self.reader.feed(data):
            if isinstance(part, Entry):
                self._begin(part)
            else:
                self._content(part)
            if self.entry is not None and not self.left:
                self._end(self.entry)

    def finish(self) -> int:
        """Gives the directories their modes and times. Returns how many entries were skipped at the source."""
        if self.reader.skipped is None:
            raise ValueError("the tree ends before its end")
        for entry in reversed(list(self.directories.values())):
            self._settle(entry)
        return self.reader.skipped

    def close(self) -> None:
        if self.fd >= 0:
            posix.close(self.fd)
            self.fd = -1

    def _path(self, entry: Entry) -> bytes:
        return self.root + b"/" + entry.path if entry.path else self.root

    def _begin(self, entry: Entry) -> None:
        path = self._path(entry)
        if entry.path and entry.path.rpartition(b"/")[0] not in self.directories:
            raise ValueError("an entry in what is not a directory of the tree")
        if entry.size > self.room:
            raise OSError(_EFBIG, "the tree is larger than allowed")
        self.room -= entry.size
        if not entry.path and not self.fresh:
            make_parents(path)
        if entry.kind == b"d":
            self._make_directory(path)
            self.directories[entry.path] = entry
            return
        if not self.fresh:
            try:  # noqa: SIM105
                posix.unlink(path)
            except FileNotFoundError:
                pass
        self.entry, self.left, self.target = entry, entry.size, b""
        if entry.kind == b"f":
            self.fd = posix.open(path, _CREATE, 0o600)

    def _make_directory(self, path: bytes) -> None:
        try:
            posix.mkdir(path, 0o700)
        except FileExistsError:
            if self.fresh or kind_of(posix.stat(path).st_mode) != b"d":
                raise

    def _content(self, block: bytes) -> None:
        self.left -= len(block)
        if self.fd < 0:
            self.target += block
            return
        view = memoryview(block)
        while view:
            view = view[posix.write(self.fd, view) :]

    def _end(self, entry: Entry) -> None:
        self.entry = None
        if entry.kind == b"l":
            path = self._path(entry)
            posix.symlink(self.target, path)
            posix.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        else:
            self.close()
            self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        path = self._path(entry)
        mode = entry.mode & 0o777
        if self.fresh:  # whoever receives a tree can read and remove it
            mode |= 0o700 if entry.kind == b"d" else 0o600
        posix.chmod(path, mode)
        posix.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
