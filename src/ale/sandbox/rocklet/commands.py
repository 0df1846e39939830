"""Commands: started, fed, listened to, timed, and ended with everything that they started."""

import posix
import select
from _signal import valid_signals  # type: ignore[import-not-found]  # `signal` imports enum, which is slow
from time import clock_gettime, monotonic, sleep

from .system import (
    CHUNK,
    ENOENT,
    candidates,
    descendants,
    kill,
    lower_limit,
    may_be_there,
    top_of,
    why,
)  # fmt: skip
from .wire import DONE, MAX_SESSION_BYTES, SESSION_FD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .agent import Rocklet

KILL_S = 1.0  # a process tree that still grows after so long is ended with everything else
LINGER_S = 0.05  # how long a pipe that outlives its command is still listened to
FLOOD_BYTES = 1 << 20  # a stream that overflows by more than this is read slowly: a flood then costs little
FLOOD_PAUSE_S = 0.01
DRAINED_PIPES = 16  # of background processes: their output goes nowhere, but they must not die of SIGPIPE

_RLIMIT_CPU, _CLOCK_BOOTTIME = 0, 7
_NEVER = float("inf")
# Reset in every command. All of them, not only those that are ignored here: the C library asks how each of the others
# is set before it sets it.
_SIGNALS = tuple(valid_signals())
_DEV_NULL = "/dev/null"


class Output:
    """One output pipe of a command: the first and the last half of what it carries."""

    def __init__(self, fd: int, keep: int) -> None:
        self.fd, self.dropped = fd, 0
        self.head, self.tail = bytearray(), bytearray()
        self.head_room, self.tail_room = keep // 2, keep - keep // 2

    def take(self, data: bytes) -> None:
        room = self.head_room - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        if data:
            self.tail += data
            excess = len(self.tail) - self.tail_room
            if excess > 0:
                del self.tail[:excess]
                self.dropped += excess

    def value(self) -> bytes:
        return bytes(self.head + self.tail)


class Child:
    """A process that was started here, the root of a tree."""

    def __init__(self, pid: int, start_tick: int) -> None:
        self.pid, self.start_tick = pid, start_tick
        self.status: int | None = None  # exit code, or minus the signal, once it has ended
        self.lingers = True  # whether the end of its output is still awaited
        self.usage = (0, 0, 0)  # user and system time in us, peak memory in kB; of it and what it waited for
        self.ended = 0.0


class Job:
    """A running command."""

    def __init__(self, number: int, child: Child, outputs: list[Output], timeout_s: float, started: float) -> None:
        self.number, self.child, self.outputs = number, child, outputs
        self.started, self.deadline = started, started + timeout_s
        self.timed_out = False
        self.stdin_fd: int | None = None
        self.stdin = memoryview(b"")
        self.session_fd: int | None = None
        # The ends that the command writes to: kept open until it has ended, so that the end of its output, which comes
        # a moment before, does not wake the loop once more for each pipe.
        self.inlets: list[int] = []


class Commands:
    def __init__(self, rocklet: "Rocklet") -> None:
        self.rocklet = rocklet
        self.ticks = posix.sysconf("SC_CLK_TCK")
        self.jobs: dict[int, Job] = {}  # by pid
        self.children: dict[int, Child] = {}  # by pid: commands and terminals
        self.readers: dict[int, tuple[Job, Output] | None] = {}  # None: drained for a background process
        self.paused: dict[int, float] = {}  # fd -> when to listen again
        self.due = _NEVER  # when to look at all of them again; too early is harmless
        self.changed = False  # whether to look at once

    # -- the loop

    def wait_ms(self) -> int | None:
        return None if self.due == _NEVER else max(0, int((self.due - monotonic()) * 1000) + 1)

    def by(self, moment: float) -> None:
        self.due = min(self.due, moment)

    def step(self) -> None:
        """Most turns of the loop change nothing here, and cost next to nothing."""
        if self.changed or (self.due != _NEVER and self.due <= monotonic()):
            self.look()

    def look(self) -> None:
        self.changed, self.due = False, _NEVER
        now = monotonic()
        for fd, until in list(self.paused.items()):
            if until <= now:
                del self.paused[fd]
                self.rocklet.watch(fd, select.POLLIN, self.read_output)
            else:
                self.by(until)
        for job in list(self.jobs.values()):
            child = job.child
            if child.status is None and job.deadline <= now and not job.timed_out:
                job.timed_out = True
                self.kill_tree(child)
            if child.status is None:
                if not job.timed_out:
                    self.by(job.deadline)
            elif now >= child.ended + LINGER_S or not self.listening(job):
                self.finish(job)
        for child in self.children.values():  # of commands, and of terminals, which look for themselves
            if child.status is not None and child.lingers:
                self.by(child.ended + LINGER_S)

    def runs(self, number: int) -> bool:
        return any(job.number == number for job in self.jobs.values())

    def cancel(self, number: int) -> None:
        for job in self.jobs.values():
            if job.number == number and job.child.status is None:
                job.deadline = self.due = 0.0

    def reap(self) -> None:
        while True:
            try:
                pid, status, usage = posix.wait4(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.get(pid)
            if child is not None:
                child.status, child.ended = posix.waitstatus_to_exitcode(status), monotonic()
                child.usage = (int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6), usage.ru_maxrss)
                self.changed = True
                if pid in self.jobs:
                    self.drain(self.jobs[pid])

    # -- one command

    def run(self, number: int, fields: list[bytes]) -> None:
        timeout_s, cpu_s, keep = float(fields[0]), fields[1], int(fields[2])
        cwd, stdin, session, argv, environment = fields[3:]
        started = monotonic()
        ours: list[int] = []
        theirs: list[int] = []
        session_fd = None
        try:
            for _ in range(2):
                out, into = posix.pipe2(posix.O_CLOEXEC)
                ours.append(out)
                theirs.append(into)
            if stdin:
                out, into = posix.pipe2(posix.O_CLOEXEC)
                ours.append(into)
                theirs.append(out)
            if session:
                session_fd = open_session(session)
            child = self.spawn(argv, environment, cwd, theirs, cpu_s, session_fd)
        except (CannotStart, OSError) as error:  # OSError: too many commands at once
            status, reason = error.args if isinstance(error, CannotStart) else (126, b"cannot start: " + why(error))
            for fd in [*ours, *theirs, *([] if session_fd is None else [session_fd])]:
                posix.close(fd)
            self.rocklet.answer(number, DONE, b"%d 0 0 0 0 0 0 0" % status, b"", reason[:keep] + b"\n", b"")
            return
        if stdin:
            posix.close(theirs.pop())
        for fd in ours:
            posix.set_blocking(fd, False)
        job = Job(number, child, [Output(fd, keep) for fd in ours[:2]], timeout_s, started)
        job.inlets = theirs
        job.session_fd = session_fd
        self.jobs[child.pid] = job
        self.by(job.deadline)
        for output in job.outputs:
            self.readers[output.fd] = (job, output)
            self.rocklet.watch(output.fd, select.POLLIN, self.read_output)
        if stdin:
            job.stdin_fd, job.stdin = ours[2], memoryview(stdin)
            self.rocklet.watch(ours[2], select.POLLOUT, lambda *_: self.feed(job))
            self.feed(job)

    def spawn(
        self,
        argv: bytes,
        environment: bytes,
        cwd: bytes,
        stdio: list[int],
        cpu_s: bytes,
        session_fd: int | None = None,
    ) -> Child:
        """Starts a program with stdout, stderr and perhaps stdin as given. Raises CannotStart."""
        actions: list[tuple] = [  # type: ignore[type-arg]
            (posix.POSIX_SPAWN_DUP2, stdio[2], 0)
            if len(stdio) > 2
            else (posix.POSIX_SPAWN_OPEN, 0, _DEV_NULL, posix.O_RDONLY, 0),
            (posix.POSIX_SPAWN_DUP2, stdio[0], 1),
            (posix.POSIX_SPAWN_DUP2, stdio[1], 2),
        ]
        if session_fd is not None:
            actions.append((posix.POSIX_SPAWN_DUP2, session_fd, SESSION_FD))
        return self.start(argv, environment, cwd, actions, cpu_s)

    def start(
        self,
        arguments: bytes,
        environment: bytes,
        cwd: bytes,
        actions: list[tuple],  # type: ignore[type-arg]
        cpu_s: bytes,
    ) -> Child:
        argv = arguments.split(b"\0")
        env = dict(pair.split(b"=", 1) for pair in environment.split(b"\0")) if environment else {}
        start_tick = int(clock_gettime(_CLOCK_BOOTTIME) * self.ticks)
        try:
            posix.chdir(cwd)
        except OSError as error:
            raise CannotStart(126, b"cannot enter " + cwd + b": " + why(error)) from error
        failure = CannotStart(127, argv[0] + b": command not found")
        try:
            for program in candidates(argv[0], env):
                if not may_be_there(program):
                    continue  # else a process would start just to find that out
                try:
                    pid = posix.posix_spawn(program, argv, env, file_actions=actions, setsid=True, setsigdef=_SIGNALS)
                except OSError as error:
                    if error.errno != ENOENT:
                        failure = CannotStart(126, program + b": " + why(error))
                    continue
                child = self.children[pid] = Child(pid, start_tick)
                if cpu_s:
                    lower_limit(_RLIMIT_CPU, int(cpu_s), pid)
                return child
        finally:
            posix.chdir("/")  # never keep a directory of the workspace busy
        raise failure

    def feed(self, job: Job) -> None:
        assert job.stdin_fd is not None
        try:
            while job.stdin:
                job.stdin = job.stdin[posix.write(job.stdin_fd, job.stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            pass  # the command closed its stdin: what is left is not wanted
        self.close_stdin(job)

    def close_stdin(self, job: Job) -> None:
        if job.stdin_fd is not None:
            self.rocklet.unwatch(job.stdin_fd)
            posix.close(job.stdin_fd)
            job.stdin_fd = None

    def read_output(self, fd: int, _: int) -> None:
        owner = self.readers[fd]
        try:
            data = posix.read(fd, CHUNK)
        except BlockingIOError:
            return
        if not data:
            self.drop_reader(fd)
        elif owner is None:
            self.pause(fd)
        else:
            owner[1].take(data)
            if owner[1].dropped > FLOOD_BYTES:
                self.pause(fd)

    def drain(self, job: Job) -> None:
        """Reads what a command that has ended left in its pipes, and their end unless a background process has them."""
        for fd in job.inlets:
            posix.close(fd)
        for output in job.outputs:
            for _ in range(2):
                if self.holds(job, output):
                    self.read_output(output.fd, select.POLLIN)

    def pause(self, fd: int) -> None:
        self.rocklet.unwatch(fd)
        self.paused[fd] = monotonic() + FLOOD_PAUSE_S
        self.by(self.paused[fd])

    def drop_reader(self, fd: int) -> None:
        self.paused.pop(fd, None)
        self.rocklet.unwatch(fd)
        owner = self.readers.pop(fd)
        if owner is not None and owner[0].child.status is not None:
            self.changed = True  # it may have been all that was awaited
        posix.close(fd)

    def holds(self, job: Job, output: Output) -> bool:
        owner = self.readers.get(output.fd)
        return owner is not None and owner[0] is job

    def listening(self, job: Job) -> bool:
        """Whether one of its output pipes has not come to its end."""
        return self.holds(job, job.outputs[0]) or self.holds(job, job.outputs[1])

    def finish(self, job: Job) -> None:
        child = job.child
        del self.jobs[child.pid]
        del self.children[child.pid]
        self.close_stdin(job)
        for output in job.outputs:
            if self.holds(job, output):  # a background process has it
                self.readers[output.fd] = None
        if self.readers:
            left = [fd for fd, owner in self.readers.items() if owner is None]
            for fd in left[:-DRAINED_PIPES]:
                self.drop_reader(fd)
        session = b""
        if job.session_fd is not None:
            session = posix.pread(job.session_fd, MAX_SESSION_BYTES, 0)
            posix.close(job.session_fd)
        out, err = job.outputs
        assert child.status is not None
        took_us = int((child.ended - job.started) * 1e6)
        figures = (child.status, job.timed_out, took_us, out.dropped, err.dropped, *child.usage)
        self.rocklet.answer(job.number, DONE, b"%d %d %d %d %d %d %d %d" % figures, out.value(), err.value(), session)

    # -- the end of a tree

    def kill_tree(self, child: Child) -> None:
        """Kills a child and whatever it started, however it hid: its own session, orphans, new sessions.

        A process belongs to the child when its line of parents ends at the child, or at an orphan that is younger
        than the child and not itself a command's root. What earlier commands left running is spared.
        """
        kill(-child.pid)
        signalled: set[int] = set()
        deadline = monotonic() + KILL_S
        while True:
            self.reap()
            table = descendants()
            victims = {pid for pid in table if self.belongs(pid, table, child)}
            # A child of a process that has its signal was there before it: the next look finds it.
            new = victims - signalled
            if not victims:
                return
            if monotonic() > deadline:
                self.end_all()
                return
            for pid in new:
                kill(pid)
            signalled |= new
            if not new:
                sleep(0.001)  # they have their signal, and need a moment to die of it

    def belongs(self, pid: int, table: dict[int, tuple[int, int]], child: Child) -> bool:
        top, _ = top_of(pid, table)
        if top == child.pid:
            return True
        return top not in self.children and table[top][1] >= child.start_tick

    def end_all(self) -> None:
        """Kills everything below this process; its own end does that when it is process 1."""
        if posix.getpid() == 1:
            kill(-1)
            return
        deadline = monotonic() + KILL_S
        while (table := descendants()) and monotonic() < deadline:
            for pid in table:
                kill(pid)
            try:
                while posix.waitpid(-1, posix.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return


class CannotStart(Exception):
    """(exit status of a shell in that case, why)."""


def open_session(state: bytes) -> int:
    """A file in memory with a session's state (its first byte is a mark, and not part of it)."""
    fd = posix.memfd_create("session", posix.MFD_CLOEXEC)
    view = memoryview(state)[1:]
    while view:
        view = view[posix.write(fd, view) :]
    return fd
