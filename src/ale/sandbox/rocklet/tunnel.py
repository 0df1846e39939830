"""Ports and unix sockets of the sandbox. An address is `tcp:PORT` (on 127.0.0.1) or `unix:PATH`."""

import posix
import select
from _socket import AF_INET, AF_UNIX, SO_ERROR, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket
from time import sleep

from .stream import Relay, Stream
from .system import EAGAIN, EINVAL
from .wire import INCOMING, MAX_INCOMING, OPENED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .agent import Rocklet

_EINPROGRESS = 115
_BACKLOG = 128
_REST_S = 0.005


def socket_for(address: bytes) -> tuple[socket, tuple[str, int] | bytes]:
    kind, _, where = address.partition(b":")
    if kind == b"tcp":
        return socket(AF_INET, SOCK_STREAM), ("127.0.0.1", int(where))
    if kind == b"unix":
        return socket(AF_UNIX, SOCK_STREAM), where
    raise OSError(EINVAL, "an address is tcp:PORT or unix:PATH")


class Connecting(Relay):
    """A connection to an address inside; opened when it stands."""

    opened = False

    def __init__(self, rocklet: "Rocklet", number: int, address: bytes) -> None:
        end, target = socket_for(address)
        try:
            end.setblocking(False)
            failed = end.connect_ex(target)
            if failed not in (0, _EINPROGRESS):
                raise OSError(failed, posix.strerror(failed))
            super().__init__(rocklet, number, posix.dup(end.fileno()))
        finally:
            end.close()
        self.standing = False
        rocklet.watch(self.fd, select.POLLOUT, self.connected)
        self.events = select.POLLOUT

    def connected(self, *_: int) -> None:
        end = socket(fileno=posix.dup(self.fd))
        failed = end.getsockopt(SOL_SOCKET, SO_ERROR)
        end.close()
        if failed:
            self.fail(OSError(failed, posix.strerror(failed)))
            return
        self.standing = True
        self.rocklet.unwatch(self.fd)
        self.events = 0
        self.rocklet.answer(self.number, OPENED)

    def step(self) -> None:
        if self.standing:
            super().step()


class Listening(Stream):
    """A listener inside; each connection becomes a stream of its own. It outlives a broken connection."""

    def __init__(self, rocklet: "Rocklet", number: int, address: bytes) -> None:
        super().__init__(rocklet, number)
        self.end_point, target = socket_for(address)
        self.connections: set[int] = set()
        try:
            if isinstance(target, tuple):
                self.end_point.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            self.end_point.bind(target)
            self.end_point.listen(_BACKLOG)
        except OSError:
            self.end_point.close()
            raise
        self.end_point.setblocking(False)
        rocklet.watch(self.end_point.fileno(), select.POLLIN, self.accept)

    def accept(self, *_: int) -> None:
        try:
            fd, _address = self.end_point._accept()  # type: ignore[attr-defined]  # `accept` is in socket.py
        except OSError as error:
            if error.errno != EAGAIN:
                sleep(_REST_S)  # no descriptor is left: the connection waits, and the loop does not spin
            return
        self.connections &= set(self.rocklet.streams)
        if len(self.connections) >= MAX_INCOMING or not self.rocklet.room():
            posix.close(fd)
            return
        number = self.rocklet.next_incoming()
        self.connections.add(number)
        self.rocklet.streams[number] = Relay(self.rocklet, number, fd)
        self.rocklet.send(INCOMING, self.number, number)

    def parted(self) -> None: ...

    def close(self) -> None:
        self.rocklet.unwatch(self.end_point.fileno())
        self.end_point.close()
        super().close()
