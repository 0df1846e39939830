"""The rocklet's loop: one thread, one `poll`, one connection at a time to the engine.

As process 1 of a pid namespace it trusts nobody inside: no signal from there reaches it and every orphan becomes its
child; it is not dumpable, so its memory and descriptors are closed to programs of the same user; its descriptors are
close-on-exec. Where it is not process 1 it adopts orphans by being their subreaper, and ends what it started before it
ends itself.

The connection is descriptor 0. When it breaks, another may come through the door, a socket on descriptor 1, which
stays open as long as the engine lives; without a door (it is not a socket) the end of the connection is the end.
`listen.py` is the other way to begin: every connection comes through a door that listens inside.
"""

import _signal  # type: ignore[import-not-found]  # `signal` imports enum, which is slow
import gc
import posix
import select
import sys
from time import monotonic

from .commands import Commands
from .files import list_directory, read_file, stat_entry, write_file
from .system import EINVAL, SIGCHLD, SIGINT, become_subreaper, forbid_dumps, lower_limit, receive_descriptor, why
from .wire import (
    ACK,
    ASK,
    CANCEL,
    CONNECT,
    CREDIT,
    DATA,
    END,
    FAILED,
    FIRST_INCOMING,
    LIST,
    LISTED,
    LISTEN,
    OK,
    OPENED,
    PACK,
    PIECE,
    PING,
    READ,
    READY,
    RESET,
    RESIZE,
    RUN,
    STAT,
    TERMINAL,
    UNPACK,
    WRITE,
    pack,
    unpack,
)  # fmt: skip

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing, which is slow
    from collections.abc import Callable

    from .stream import Stream

_DEV_NULL = "/dev/null"
_FIRST_FREE_FD = 10  # below lie the descriptors that commands start with
_OUTBOX_BYTES = 1 << 19  # beyond this streams wait: what cannot be sent must not pile up
_READ_BYTES = 100_000  # more, and the C library maps and unmaps memory for every read
_LOOK_MS = 1000  # how often one that is alone looks at the clock
_ESTALE = 116


class Rocklet:
    def __init__(
        self,
        connection: int,
        door: int,
        limits: list[tuple[int, int]],
        enter: "Callable[[int], int | None]" = receive_descriptor,
        alone_s: float | None = None,
    ) -> None:
        """`enter(door)`: the connection that waits at the door, -1: none after all, None: nobody will come any more.
        `alone_s`: how long it goes on without a connection."""
        self.connection, self.door, self.enter = connection, door, enter
        self.alone_s, self.alone_since = alone_s, monotonic()
        self.poller = select.poll()
        self.handlers: dict[int, Callable[[int, int], None]] = {}  # called with descriptor and events
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.highest = 0  # request seen
        self.answers: dict[int, bytes] = {}  # not yet acknowledged
        self.told: set[int] = set()  # those of them that went over the present connection
        self.streams: dict[int, Stream] = {}
        self.incoming = FIRST_INCOMING
        self.running = True
        self.harden(limits)
        self.commands = Commands(self)
        self.wake, wake_in = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        _signal.signal(SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        self.watch(self.wake, select.POLLIN, self.awake)
        if door >= 0:
            self.watch(door, select.POLLIN, self.at_the_door)

    def harden(self, limits: list[tuple[int, int]]) -> None:
        _signal.signal(SIGINT, _signal.SIG_IGN)  # the one signal that Python would let through to process 1
        forbid_dumps()
        if posix.getpid() != 1:
            become_subreaper()
        for resource, value in limits:  # inherited by every command
            lower_limit(resource, value)

    # -- the loop

    def watch(self, fd: int, events: int, handler: "Callable[[int, int], None]") -> None:
        self.poller.register(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def serve(self) -> None:
        gc.enable()  # which `gate.py` had turned off
        if self.connection >= 0:
            self.meet()
        poll, handlers, commands = self.poller.poll, self.handlers, self.commands
        while self.running and not self.abandoned():
            for fd, event in poll(self.wait_ms()):
                handler = handlers.get(fd)
                if handler is not None:  # else a handler before it has let go of this one
                    handler(fd, event)
            commands.step()
            if self.streams:
                for stream in list(self.streams.values()):
                    stream.step()
        commands.end_all()

    def wait_ms(self) -> "int | None":
        if self.streams and any(stream.eager() for stream in self.streams.values()):
            return 0
        wait_ms = self.commands.wait_ms()
        if self.alone_s is not None and self.connection < 0 and (wait_ms is None or wait_ms > _LOOK_MS):
            return _LOOK_MS
        return wait_ms

    def abandoned(self) -> bool:
        if self.alone_s is None or self.connection >= 0:
            return False
        return monotonic() > self.alone_since + self.alone_s

    def awake(self, fd: int, _: int) -> None:
        posix.read(fd, 4096)
        self.commands.reap()

    def room(self) -> bool:
        """Whether streams may add to what is waiting to be sent."""
        return self.connection >= 0 and len(self.outbox) < _OUTBOX_BYTES

    # -- the connection

    def meet(self) -> None:
        self.told.clear()
        posix.set_blocking(self.connection, False)
        self.watch(self.connection, select.POLLIN, self.on_connection)
        self.send(READY, 0, self.highest)

    def at_the_door(self, fd: int, _: int) -> None:
        fresh = self.enter(fd)
        if fresh is None:  # the engine has gone
            self.running = False
            return
        if fresh < 0:
            return
        self.part()
        self.connection = fresh
        self.meet()

    def part(self) -> None:
        """Forgets the connection. Commands go on, their answers are kept; streams do not survive."""
        if self.connection >= 0:
            self.unwatch(self.connection)
            posix.close(self.connection)
            self.connection = -1
            self.alone_since = monotonic()
        self.inbox.clear()
        self.outbox.clear()
        for stream in list(self.streams.values()):
            stream.parted()
        if self.door < 0:
            self.running = False

    def on_connection(self, _: int, event: int) -> None:
        if event & ~select.POLLOUT and not self.receive():
            self.part()
        elif event & select.POLLOUT:
            self.flush()
            if not self.outbox:
                self.poller.modify(self.connection, select.POLLIN)

    def receive(self) -> bool:
        try:
            data = posix.read(self.connection, _READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        inbox = self.inbox
        inbox += data
        at = 0
        while len(inbox) - at >= 4:
            end = at + 4 + int.from_bytes(inbox[at : at + 4], "little")
            if len(inbox) < end:
                break
            frame = bytes(inbox[at + 4 : end])
            at = end
            self.take(*unpack(frame))
        del inbox[:at]
        return bool(data)

    def send(self, kind: int, number: int, *fields: bytes | int) -> None:
        self.post(pack(kind, number, *fields))

    def post(self, frame: bytes) -> None:
        if self.connection < 0:
            return
        waiting = bool(self.outbox)
        self.outbox += frame
        if not waiting:  # else the loop is told when there is room
            self.flush()
            if self.outbox:
                self.poller.modify(self.connection, select.POLLIN | select.POLLOUT)

    def flush(self) -> None:
        try:
            while self.outbox:
                del self.outbox[: posix.write(self.connection, self.outbox)]
        except BlockingIOError:
            pass
        except OSError:  # broken: the loop sees its end and parts
            self.outbox.clear()

    # -- requests

    def answer(self, number: int, kind: int, *fields: bytes | int) -> None:
        """Answers a request, once and for all: kept until it is acknowledged."""
        self.answers[number] = pack(kind, number, *fields)
        self.tell(number)

    def tell(self, number: int) -> None:
        if self.connection >= 0 and number not in self.told:
            self.told.add(number)
            self.post(self.answers[number])

    def take(self, kind: int, number: int, fields: list[bytes]) -> None:
        if kind == ACK:
            for answered in map(int, fields[0].split()):
                self.answers.pop(answered, None)
                self.told.discard(answered)
        elif kind == ASK:
            if number in self.answers:
                self.tell(number)
            elif not self.commands.runs(number):
                self.send(FAILED, number, _ESTALE, b"nothing is known of this request")
        elif kind == CANCEL:
            self.commands.cancel(number)
        elif kind in (PIECE, CREDIT, END, RESET, RESIZE):
            if number in self.streams:
                self.streams[number].take(kind, fields)
        elif number > self.highest:  # else it was seen before, and is never done again
            self.highest = number
            try:
                self.begin(kind, number, fields)
            except OSError as error:
                self.answer(number, FAILED, error.errno or EINVAL, why(error))

    def begin(self, kind: int, number: int, fields: list[bytes]) -> None:
        if kind == RUN:
            self.commands.run(number, fields)
        elif kind == READ:
            self.answer(number, DATA, read_file(fields[0], int(fields[1])))
        elif kind == WRITE:
            write_file(fields[0], int(fields[1]), fields[2])
            self.answer(number, OK)
        elif kind == LIST:
            self.answer(number, LISTED, *list_directory(fields[0]))
        elif kind == STAT:
            self.answer(number, LISTED, stat_entry(fields[0], fields[0]))
        elif kind == PING:
            self.answer(number, OK)
        elif kind == PACK:
            from .stream import Packing

            self.open(Packing(self, number, fields[0]))
        elif kind == UNPACK:
            from .stream import Unpacking

            self.open(Unpacking(self, number, fields[0], int(fields[1])))
        elif kind == TERMINAL:
            from .terminal import Terminal

            self.open(Terminal(self, number, fields))
        elif kind == CONNECT:
            from .tunnel import Connecting

            self.open(Connecting(self, number, fields[0]))
        elif kind == LISTEN:
            from .tunnel import Listening

            self.open(Listening(self, number, fields[0]))

    def open(self, stream: "Stream") -> None:
        self.streams[stream.number] = stream
        if stream.opened:
            self.send(OPENED, stream.number)

    def next_incoming(self) -> int:
        self.incoming = FIRST_INCOMING + (self.incoming + 1 - FIRST_INCOMING) % (FIRST_INCOMING - 1)
        return self.incoming


def main() -> None:
    """Arguments: resource limits as `number=value`."""
    fd = take_low_descriptors()
    connection = posix.dup(0)  # close-on-exec, like everything that Python opens
    door = posix.dup(1) if posix.fstat(1).st_mode & 0o170000 == 0o140000 else -1
    posix.dup2(fd, 0)
    posix.dup2(fd, 1)
    Rocklet(connection, door, read_limits(sys.argv[1:])).serve()


def take_low_descriptors() -> int:
    """Leaves none free below those that commands start with; a descriptor of /dev/null."""
    while (fd := posix.open(_DEV_NULL, posix.O_RDONLY)) < _FIRST_FREE_FD:
        pass
    return fd


def read_limits(arguments: list[str]) -> list[tuple[int, int]]:
    return [(int(number), int(value)) for number, value in (argument.split("=") for argument in arguments)]
