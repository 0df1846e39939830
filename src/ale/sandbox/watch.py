"""The watch: the connections that programs in a sandbox try to make, reported by the kernel (seccomp notification).

It only looks. A program could change the address between this look and the kernel's own, so nothing is decided here:
what holds is that a sandbox has no way out. Sources: seccomp_unotify(2), linux/seccomp.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import platform
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ale.sandbox.seccomp import watch_numbers

_NOTIF = struct.Struct("=QII iIQ6Q")  # id, pid, flags; seccomp_data: nr, arch, instruction pointer, arguments
_RESPONSE = struct.Struct("=QqiI")  # id, value, error, flags
_CONTINUE = 1
_RECV, _SEND, _ID_VALID = 0xC0502100, 0xC0182101, 0x40082102
_ADDRESS_BYTES = 28  # the longest that is looked at: sockaddr_in6
# So many reports are taken in one go; then the programs that wait for an answer wait, and the engine does not.
_BURST, _PAUSE_S = 50, 0.1


class Attempt(NamedTuple):
    """A connection or a datagram that `pid` (as the host counts) is about to send from its descriptor `fd`."""

    kind: str
    host: str
    port: int
    pid: int
    fd: int


class Watch:
    """Owns the descriptor of the reports. `see` is called before the program goes on."""

    def __init__(self, fd: int, see: Callable[[Attempt], None]) -> None:
        self._fd, self._see = fd, see
        self._loop = asyncio.get_running_loop()
        self._connect, self._sendto = watch_numbers(platform.machine())
        self._pause: asyncio.TimerHandle | None = None
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._loop.add_reader(fd, self._on_reports)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            if self._pause is not None:
                self._pause.cancel()
            os.close(self._fd)
            self._fd = -1

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._on_reports)

    def _on_reports(self) -> None:
        for _ in range(_BURST):
            ready = self._poll.poll(0)
            if not ready:
                return
            if not ready[0][1] & select.POLLIN:
                self.close()  # the last process has gone
                return
            self._one()
        self._loop.remove_reader(self._fd)
        self._pause = self._loop.call_later(_PAUSE_S, self._listen)

    def _one(self) -> None:
        buffer = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(self._fd, _RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # the program was killed meanwhile
                return
            raise
        number, pid, _, call, _, _, *arguments = _NOTIF.unpack(buffer)
        try:
            if call == self._connect:
                self._look("connect", number, pid, arguments[0], arguments[1], arguments[2])
            elif call == self._sendto:
                self._look("datagram", number, pid, arguments[0], arguments[4], arguments[5])
        finally:
            with contextlib.suppress(OSError):  # it was killed meanwhile
                fcntl.ioctl(self._fd, _SEND, _RESPONSE.pack(number, 0, 0, _CONTINUE))

    def _look(self, kind: str, number: int, pid: int, fd: int, address: int, size: int) -> None:
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(memory, min(size & 0xFFFFFFFF, _ADDRESS_BYTES), address)
            finally:
                os.close(memory)
            fcntl.ioctl(self._fd, _ID_VALID, struct.pack("=Q", number))  # else another process may have the pid by now
        except (OSError, OverflowError):
            return
        destination = parse_address(data)
        if destination is not None:
            self._see(Attempt(kind, *destination, pid, fd & 0xFFFFFFFF))


def parse_address(data: bytes) -> tuple[str, int] | None:
    """(host, port) of a struct sockaddr of the internet; None for any other."""
    if len(data) < 2:
        return None
    family = int.from_bytes(data[:2], "little")
    if family == socket.AF_INET and len(data) >= 8:
        return socket.inet_ntop(socket.AF_INET, data[4:8]), int.from_bytes(data[2:4], "big")
    if family == socket.AF_INET6 and len(data) >= 24:
        return socket.inet_ntop(socket.AF_INET6, data[8:24]), int.from_bytes(data[2:4], "big")
    return None


def local_port(pid: int, fd: int) -> int | None:
    """The local TCP port of a process's descriptor; None: it is no such socket, or the process has gone."""
    try:
        inode = os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]")
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] == inode:
                return int(fields[1].rpartition(":")[2], 16)
    except (OSError, ValueError, IndexError):
        return None
    return None
