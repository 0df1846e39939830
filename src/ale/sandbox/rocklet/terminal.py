"""A command on a pseudo-terminal: keys in, what the screen is told out, the exit status with the end."""

import posix
from time import monotonic

from .commands import LINGER_S, CannotStart
from .stream import Relay
from .system import c_call
from .wire import END, RESIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .agent import Rocklet

_TIOCSWINSZ = 0x5414


class Terminal(Relay):
    def __init__(self, rocklet: "Rocklet", number: int, fields: list[bytes]) -> None:
        rows, columns = int(fields[0]), int(fields[1])
        cpu_s, cwd, argv, environment = fields[2:]
        ours, theirs = posix.openpty()
        try:
            resize(ours, rows, columns)
            name = posix.ttyname(theirs)
            # Opened by a session leader that has none, it becomes its controlling terminal.
            actions = [(posix.POSIX_SPAWN_OPEN, 0, name, posix.O_RDWR, 0), (posix.POSIX_SPAWN_DUP2, 0, 1)]
            actions.append((posix.POSIX_SPAWN_DUP2, 0, 2))
            self.child = rocklet.commands.start(argv, environment, cwd, actions, cpu_s)
        except CannotStart as error:
            posix.close(ours)
            raise OSError(2 if error.args[0] == 127 else 13, error.args[1].decode("utf-8", "replace")) from error
        except BaseException:
            posix.close(ours)
            raise
        finally:
            posix.close(theirs)
        super().__init__(rocklet, number, ours)

    def take(self, kind: int, fields: list[bytes]) -> None:
        if kind == RESIZE:
            resize(self.fd, int(fields[0]), int(fields[1]))
        else:
            super().take(kind, fields)

    def end(self) -> None:
        """A terminal has no half of it to close; its user types end of file."""

    def at_end(self) -> None: ...

    def eager(self) -> bool:
        return self.child.status is not None and not self.child.lingers and (self.credit > 0 or not self.reading)

    def step(self) -> None:
        super().step()
        child = self.child
        if child.status is None:
            return
        # A background process may hold the terminal; what it says later is not waited for.
        child.lingers = self.reading and monotonic() < child.ended + LINGER_S
        if not self.eager():
            return
        if self.reading:
            self.read()  # what is there at once
        self.rocklet.send(END, self.number, child.status)
        self.close()

    def close(self) -> None:
        if self.child.status is None:
            self.rocklet.commands.kill_tree(self.child)
        self.rocklet.commands.children.pop(self.child.pid, None)
        super().close()


def resize(fd: int, rows: int, columns: int) -> None:
    size = b"".join(value.to_bytes(2, "little") for value in (rows, columns, 0, 0))
    c_call("ioctl", fd, _TIOCSWINSZ, size)
