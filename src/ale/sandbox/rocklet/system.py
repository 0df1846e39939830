"""What the rocklet asks of the C library and the kernel beyond Python's `posix`."""

import _ctypes
import posix
import sys

SIGKILL, SIGCHLD, SIGINT = 9, 17, 2
ENOENT, EINVAL, EFBIG, EISDIR, EAGAIN = 2, 22, 27, 21, 11
CHUNK = 65536

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_SCM_ROOM = 64  # bytes of ancillary data: one descriptor and its header


class Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """Data with an address. Not `array`: that imports `collections`, half a megabyte in every sandbox."""

    _type_ = "B"


def c_call(function: str, *arguments: int | bytes) -> int:
    """Calls the C library without the `ctypes` package, which takes longer to import than Python to start."""
    address = _ctypes.dlsym(_ctypes.dlopen(None, 0), function)  # type: ignore[arg-type]  # None: this program
    return int(_ctypes.call_function(address, arguments))


def forbid_dumps() -> None:
    if c_call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_DUMPABLE) failed")


def become_subreaper() -> None:
    if c_call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def lower_limit(resource: int, value: int, pid: int = 0) -> None:
    """Sets soft and hard resource limit of a process (0: this one)."""
    pair = value.to_bytes(8, sys.byteorder) * 2
    if c_call("prlimit", pid, resource, pair, 0) != 0 and pid == 0:
        raise OSError(f"prlimit({resource}, {value}) failed")


def receive_descriptor(door: int) -> int | None:
    """The descriptor that waits at a unix socket; None when the other side has gone."""
    from _socket import MSG_CMSG_CLOEXEC, socket

    end = socket(fileno=posix.dup(door))
    try:
        data, ancillary, _, _ = end.recvmsg(1, _SCM_ROOM, MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    finally:
        end.close()
    if not data or not ancillary:
        return None
    return int.from_bytes(ancillary[0][2][:4], sys.byteorder)


def why(error: OSError) -> bytes:
    return str(error.strerror or error).encode()


def kill(pid: int) -> None:
    try:  # noqa: SIM105 (contextlib is a slow import)
        posix.kill(pid, SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def descendants() -> dict[int, tuple[int, int]]:
    """pid -> (parent, start in clock ticks since boot) of every living process below this one."""
    table: dict[int, tuple[int, int]] = {}
    for name in posix.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fd = posix.open("/proc/" + name + "/stat", posix.O_RDONLY | posix.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile
        try:
            fields = posix.read(fd, 4096).rpartition(b")")[2].split()
        except OSError:
            continue
        finally:
            posix.close(fd)
        # Without a parent in this namespace: it was sent in from outside, and nothing here started it.
        if fields[0] not in (b"Z", b"X") and fields[1] != b"0":
            table[int(name)] = (int(fields[1]), int(fields[19]))
    me = posix.getpid()
    table.pop(me, None)
    return table if me == 1 else {pid: table[pid] for pid in table if top_of(pid, table)[1] == me}


def top_of(pid: int, table: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The last ancestor of a process that is in the table, and that one's parent."""
    for _ in table:  # bounded: a pid that is reused while the table is read could close a circle
        parent = table[pid][0]
        if parent not in table:
            break
        pid = parent
    return pid, table[pid][0]


def candidates(name: bytes, env: dict[bytes, bytes]) -> list[bytes]:
    if b"/" in name:
        return [name]
    return [folder + b"/" + name for folder in env.get(b"PATH", b"").split(b":") if folder]


def may_be_there(program: bytes) -> bool:
    try:
        posix.stat(program)
    except OSError as error:
        return error.errno != ENOENT
    return True
