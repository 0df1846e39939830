"""Streams: many at once over the connection, each under credit, so that none holds more than a window of bytes."""

import posix
import select

from .system import EINVAL, c_call, why
from .trees import TreeWriter, pack_tree
from .wire import CREDIT, END, FAILED, OK, PIECE, PIECE_BYTES, RESET, WINDOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .agent import Rocklet

_SHUT_WR = 1


class Stream:
    """One stream; `credit` is what may still be sent."""

    opened = True  # whether OPENED may be said at once

    def __init__(self, rocklet: "Rocklet", number: int) -> None:
        self.rocklet, self.number, self.credit = rocklet, number, WINDOW

    def take(self, kind: int, fields: list[bytes]) -> None:
        if kind == CREDIT:
            self.credit += int(fields[0])
        elif kind == PIECE:
            self.piece(fields[0])
        elif kind == END:
            self.end()
        elif kind == RESET:
            self.close()

    def piece(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def eager(self) -> bool:
        """Whether there is something to send that no descriptor will tell of."""
        return False

    def step(self) -> None:
        """Called in each turn of the loop."""

    def parted(self) -> None:
        """The connection broke."""
        self.close()

    def fail(self, error: OSError) -> None:
        self.rocklet.send(FAILED, self.number, error.errno or EINVAL, why(error))
        self.close()

    def send(self, data: bytes) -> None:
        self.credit -= len(data)
        self.rocklet.send(PIECE, self.number, data)

    def close(self) -> None:
        self.rocklet.streams.pop(self.number, None)


class Packing(Stream):
    """A tree on its way out."""

    def __init__(self, rocklet: "Rocklet", number: int, path: bytes) -> None:
        super().__init__(rocklet, number)
        posix.lstat(path)  # what is not there is refused at once
        self.pieces = pack_tree(path, strict=False)

    def eager(self) -> bool:
        return self.credit >= PIECE_BYTES + 16 and self.rocklet.room()

    def step(self) -> None:
        if not self.eager():
            return
        try:
            piece = next(self.pieces, None)
        except OSError as error:
            self.fail(error)
            return
        if piece is None:
            self.rocklet.send(END, self.number, b"")
            self.close()
        else:
            self.send(piece)


class Unpacking(Stream):
    """A tree on its way in. The end of the other side is answered by OK when all is on disk, or by FAILED."""

    def __init__(self, rocklet: "Rocklet", number: int, path: bytes, max_bytes: int) -> None:
        super().__init__(rocklet, number)
        self.writer = TreeWriter(path, max_bytes, fresh=False)

    def piece(self, data: bytes) -> None:
        try:
            self.writer.feed(data)
        except OSError as error:
            self.fail(error)
        except ValueError as error:
            self.fail(OSError(EINVAL, str(error)))
        else:
            self.rocklet.send(CREDIT, self.number, len(data))

    def end(self) -> None:
        try:
            self.writer.finish()
        except OSError as error:
            self.fail(error)
        except ValueError as error:
            self.fail(OSError(EINVAL, str(error)))
        else:
            self.rocklet.send(OK, self.number)
            self.close()

    def close(self) -> None:
        self.writer.close()
        super().close()


class Relay(Stream):
    """A descriptor of a socket or terminal, both ways."""

    def __init__(self, rocklet: "Rocklet", number: int, fd: int) -> None:
        super().__init__(rocklet, number)
        self.fd = fd
        self.pending = bytearray()  # from the engine; at most a window, because credit comes when it is written
        self.reading = True
        self.peer_ended = self.half_closed = False
        self.events = 0
        posix.set_blocking(fd, False)

    def piece(self, data: bytes) -> None:
        self.pending += data
        self.write()

    def end(self) -> None:
        self.peer_ended = True
        self.write()

    def step(self) -> None:
        wanted = select.POLLIN if self.reading and self.credit > 0 and self.rocklet.room() else 0
        if self.pending:
            wanted |= select.POLLOUT
        if self.fd >= 0 and wanted != self.events:
            self.rocklet.unwatch(self.fd)  # without events it would still be told of hang-ups, without end
            if wanted:
                self.rocklet.watch(self.fd, wanted, self.on_event)
            self.events = wanted

    def on_event(self, _: int, event: int) -> None:
        if event & select.POLLOUT:
            self.write()
        if event & ~select.POLLOUT and self.fd >= 0 and self.reading and self.credit > 0:
            self.read()

    def read(self) -> None:
        try:
            data = posix.read(self.fd, min(PIECE_BYTES, self.credit))
        except BlockingIOError:
            return
        except OSError:  # a terminal whose last user has gone, a connection that was reset
            data = b""
        if data:
            self.send(data)
        else:
            self.reading = False
            self.at_end()

    def at_end(self) -> None:
        """Nothing more will be read."""
        self.rocklet.send(END, self.number, b"")
        self.close_if_done()

    def write(self) -> None:
        try:
            while self.pending:
                count = posix.write(self.fd, self.pending)
                del self.pending[:count]
                self.rocklet.send(CREDIT, self.number, count)
        except BlockingIOError:
            return
        except OSError:
            self.rocklet.send(RESET, self.number)
            self.close()
            return
        if self.peer_ended and not self.half_closed:
            self.half_closed = True
            c_call("shutdown", self.fd, _SHUT_WR)
            self.close_if_done()

    def close_if_done(self) -> None:
        if self.half_closed and not self.reading:
            self.close()

    def close(self) -> None:
        if self.fd >= 0:
            self.rocklet.unwatch(self.fd)
            posix.close(self.fd)
            self.fd = -1
        super().close()
