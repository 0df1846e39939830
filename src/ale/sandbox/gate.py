"""The gate: what process 1 of a sandbox does before it becomes the rocklet. Standard library only.

It opens the port of the egress proxy and asks the kernel to report every connection that a program tries to make, and
hands both descriptors to the engine outside. Nobody inside holds either: there is nothing to kill, forge or go around.

    python -I -S gate.pyc PORT FILTER SCRIPT [argument ...]      PORT 0: no proxy
"""

import _ctypes
import _socket
import gc
import marshal
import posix
import sys

GATE_FD = 5  # as in launcher.py, which is not there inside
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
_PYC_HEADER = 16
_BACKLOG = 64


class Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """Data with an address. Not `array`: that imports `collections`, half a megabyte in every sandbox."""

    _type_ = "B"


def watch(program: bytes) -> int:
    """Installs the filter for this process and all that come of it; the descriptor that its reports come from."""
    instructions = (Byte * len(program)).from_buffer_copy(program)
    sock_fprog = (len(program) // 8).to_bytes(8, "little") + _ctypes.addressof(instructions).to_bytes(8, "little")
    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None: this program
    call = (_SECCOMP[posix.uname().machine], _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER, sock_fprog)
    fd = int(_ctypes.call_function(_ctypes.dlsym(library, "syscall"), call))
    if fd < 0:
        raise OSError("the kernel does not report connections: seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER) failed")
    return fd


def main() -> None:
    gc.disable()  # nothing is garbage before the rocklet serves, which turns it on
    port, program, script = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    fds = []
    if port:
        listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", port))
        listener.listen(_BACKLOG)
        fds.append(listener.detach())
    with open(program, "rb") as file:
        fds.append(watch(file.read()))
    engine = _socket.socket(fileno=GATE_FD)
    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    engine.sendmsg([b"g"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)])
    engine.close()
    for fd in fds:
        posix.close(fd)
    with open(script, "rb") as file:
        file.seek(_PYC_HEADER)
        code = marshal.loads(file.read())
    sys.argv = sys.argv[3:]
    exec(code, {"__name__": "__main__", "__file__": script})


if __name__ == "__main__":
    main()
