"""The rocklet where no descriptor can be handed to it, as in a container: it listens, and is connected to from inside
by a bridge that the engine has started there.

Arguments: FILTER PEER ALONE [number=value ...]. FILTER: a seccomp program to install first. PEER: the one user whose
connections are taken; commands are another's, so none of them can pass for the engine. ALONE: seconds without a
connection after which everything here ends.
"""

import _ctypes
import posix
import sys
from _socket import AF_UNIX, SO_PEERCRED, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket

from .agent import Rocklet, read_limits, take_low_descriptors
from .system import Byte, c_call

# Abstract: of the network namespace, which is the sandbox's own.
ADDRESS = b"\0rocklet"
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 1, 38
_UCRED_BYTES = 12
_BACKLOG = 16


def install(path: str) -> None:
    """Puts a filter above those in force, for this process and all that come of it."""
    with open(path, "rb") as file:
        program = file.read()
    instructions = (Byte * len(program)).from_buffer_copy(program)
    sock_fprog = (len(program) // 8).to_bytes(8, "little") + _ctypes.addressof(instructions).to_bytes(8, "little")
    if c_call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_NO_NEW_PRIVS) failed")
    if c_call("syscall", _SECCOMP[posix.uname().machine], _SECCOMP_SET_MODE_FILTER, 0, sock_fprog) != 0:
        raise OSError("seccomp(SECCOMP_SET_MODE_FILTER) failed")


def listen() -> int:
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    listener.bind(ADDRESS)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener.detach()


def accept(door: int, peer: int) -> int:
    """The connection that waits; -1: it has gone again, or is not that user's."""
    listener = socket(fileno=posix.dup(door))
    try:
        fd, _ = listener._accept()  # type: ignore[attr-defined]
    except OSError:
        return -1
    finally:
        listener.close()
    end = socket(fileno=fd)
    credentials = end.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED_BYTES)  # pid, uid, gid
    if int.from_bytes(credentials[4:8], sys.byteorder) == peer:
        return end.detach()
    end.close()
    return -1


def main() -> None:
    program, peer, alone_s, *limits = sys.argv[1:]
    fd = take_low_descriptors()
    posix.dup2(fd, 0)
    posix.dup2(fd, 1)
    install(program)
    Rocklet(-1, listen(), read_limits(limits), lambda door: accept(door, int(peer)), float(alone_s)).serve()
