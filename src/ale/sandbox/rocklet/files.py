"""Files read or written at once, and what there is of them."""

import posix

from .system import EFBIG, EINVAL

MAX_LISTED_BYTES = 8 << 20
_E2BIG = 7
_KINDS = {0o100000: b"f", 0o040000: b"d", 0o120000: b"l"}


def kind_of(mode: int) -> bytes:
    """f, d, l (symbolic link) or o (device, pipe, socket)."""
    return _KINDS.get(mode & 0o170000, b"o")


def regular(fd: int) -> None:
    if kind_of(posix.fstat(fd).st_mode) != b"f":
        raise OSError(EINVAL, "not a regular file")


def read_file(path: bytes, max_bytes: int) -> bytes:
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY)
    try:
        regular(fd)
        data = bytearray()
        while len(data) <= max_bytes:
            chunk = posix.read(fd, min(1 << 20, max_bytes + 1 - len(data)))
            if not chunk:
                return bytes(data)
            data += chunk
        raise OSError(EFBIG, f"larger than {max_bytes} bytes")
    finally:
        posix.close(fd)


def make_parents(path: bytes) -> None:
    at = path.find(b"/", 1)
    while at > 0:
        try:  # noqa: SIM105
            posix.mkdir(path[:at], 0o755)
        except OSError:
            pass  # there already, or what needs it says why it cannot be
        at = path.find(b"/", at + 1)


def write_file(path: bytes, mode: int, data: bytes) -> None:
    make_parents(path)
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY
    fd = posix.open(path, flags, mode)
    try:
        regular(fd)
        posix.ftruncate(fd, 0)
        view = memoryview(data)
        while view:
            view = view[posix.write(fd, view) :]
        posix.fchmod(fd, mode)
    finally:
        posix.close(fd)


def stat_entry(path: bytes, name: bytes) -> bytes:
    """`kind mode size mtime_ns name` of a path, links not followed."""
    info = posix.lstat(path)
    return b"%s %d %d %d %s" % (kind_of(info.st_mode), info.st_mode & 0o7777, info.st_size, info.st_mtime_ns, name)


def list_directory(path: bytes) -> list[bytes]:
    """The entries of a directory, sorted by name."""
    entries: list[bytes] = []
    size = 0
    for name in sorted(posix.listdir(path)):
        try:
            entry = stat_entry(path + b"/" + name, name)
        except OSError:
            continue  # gone meanwhile
        size += len(entry) + 4
        if size > MAX_LISTED_BYTES:
            raise OSError(_E2BIG, "too many entries to list at once")
        entries.append(entry)
    return entries
