"""The rocklet: process 1 of a sandbox, which runs commands for the engine outside. Standard library only.

It starts in about 10 ms because it imports next to nothing, and trusts nobody inside: it is process 1, so no signal
from inside reaches it and every orphan becomes its child; it is not dumpable, so its memory and descriptors are closed
to programs of the same user; its descriptors are close-on-exec. Requests come over a socket on descriptor 0.

    frame = length u32 | kind u8 | request u32 | field*      length counts what follows it; little-endian
    field = length u32 | bytes                               numbers are decimal ASCII

The engine imports this file for the wire format alone.
"""

import _ctypes
import _signal  # type: ignore[import-not-found]  # `signal` imports enum, which is slow
import posix
import select
import sys
from time import clock_gettime, monotonic, sleep

RUN, READ, WRITE, CANCEL = 1, 2, 3, 4  # requests
READY, DONE, DATA, WROTE, FAILED = 16, 17, 18, 19, 20  # replies; all but READY answer one request, once

HEADER_BYTES = 5  # kind and request
KILL_S = 1.0  # a process tree that still grows after so long is ended with everything else
LINGER_S = 0.05  # how long a pipe that outlives its command is still listened to
FLOOD_BYTES = 1 << 20  # a stream that overflows by more than this is read slowly: a flood then costs little
FLOOD_PAUSE_S = 0.01
CHUNK = 65536
DRAINED_PIPES = 16  # of background processes: their output goes nowhere, but they must not die of SIGPIPE

_SIGKILL, _SIGPIPE, _SIGXFSZ, _SIGCHLD, _SIGINT = 9, 13, 25, 17, 2
_PR_SET_DUMPABLE, _RLIMIT_CPU, _CLOCK_BOOTTIME = 4, 0, 7
_ENOENT, _EFBIG, _EINVAL = 2, 27, 22
_STDIO_NULL = "/dev/null"


def pack(kind: int, request: int, *fields: bytes | int) -> bytes:
    """One frame. Every field is bytes or an int."""
    body: list[bytes] = [kind.to_bytes(1, "little"), request.to_bytes(4, "little")]
    for field in fields:
        data = field if isinstance(field, bytes) else b"%d" % field
        body += (len(data).to_bytes(4, "little"), data)
    frame = b"".join(body)
    return len(frame).to_bytes(4, "little") + frame


def unpack(frame: bytes) -> tuple[int, int, list[bytes]]:
    """(kind, request, fields) of a frame without its length. Raises ValueError when the fields do not fill it."""
    if len(frame) < HEADER_BYTES:
        raise ValueError("frame shorter than its header")
    fields: list[bytes] = []
    at = HEADER_BYTES
    while at < len(frame):
        size = int.from_bytes(frame[at : at + 4], "little")
        at += 4 + size
        if at > len(frame):
            raise ValueError("field reaches past the end of its frame")
        fields.append(frame[at - size : at])
    return frame[0], int.from_bytes(frame[1:5], "little"), fields


def c_call(function: str, *arguments: int | bytes) -> int:
    """Calls the C library without the `ctypes` package, which takes longer to import than Python to start."""
    address = _ctypes.dlsym(_ctypes.dlopen(None, 0), function)  # type: ignore[arg-type]  # None: this program
    return int(_ctypes.call_function(address, arguments))


class Stream:
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


class Job:
    """A running command."""

    def __init__(
        self,
        request: int,
        pid: int,
        streams: list[Stream],
        stdin_fd: int | None,
        stdin: bytes,
        timeout_s: float,
        start_tick: int,
        started: float,
    ) -> None:
        self.request, self.pid, self.streams = request, pid, streams
        self.stdin_fd, self.stdin = stdin_fd, memoryview(stdin)
        self.start_tick, self.started = start_tick, started
        self.deadline = started + timeout_s
        self.status: int | None = None
        self.timed_out = False
        self.ended = 0.0


class Rocklet:
    def __init__(self, control: int, limits: list[tuple[int, int]]) -> None:
        self.control, self.limits = control, limits
        self.poller = select.poll()
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.jobs: dict[int, Job] = {}  # by pid
        self.readers: dict[int, tuple[Job, Stream] | None] = {}  # None: drained for a background process
        self.writers: dict[int, Job] = {}
        self.paused: dict[int, float] = {}  # fd -> when to listen again
        self.ticks = posix.sysconf("SC_CLK_TCK")
        self.harden()
        self.wake, wake_in = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        _signal.signal(_SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        self.poller.register(control, select.POLLIN)
        self.poller.register(self.wake, select.POLLIN)

    def harden(self) -> None:
        _signal.signal(_SIGINT, _signal.SIG_IGN)  # the one signal that Python would let through to process 1
        if c_call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError("prctl(PR_SET_DUMPABLE) failed")
        for resource, value in self.limits:  # inherited by every command
            pair = value.to_bytes(8, sys.byteorder) * 2
            if c_call("setrlimit", resource, pair) != 0:
                raise OSError(f"setrlimit({resource}, {value}) failed")

    # -- the loop

    def serve(self) -> None:
        self.send(READY, 0)
        while True:
            for fd, event in self.poller.poll(self.next_wait_ms()):
                if fd == self.control:
                    if event & ~select.POLLOUT and not self.receive():
                        return  # the engine has gone; process 1 ends and the kernel ends the rest
                    if event & select.POLLOUT:
                        self.flush()
                elif fd == self.wake:
                    posix.read(self.wake, 4096)
                elif fd in self.readers:
                    self.read_output(fd)
                elif fd in self.writers:
                    self.feed(self.writers[fd])
            self.reap()
            now = monotonic()
            for fd in [fd for fd, until in self.paused.items() if until <= now]:
                del self.paused[fd]
                self.poller.register(fd, select.POLLIN)
            for job in list(self.jobs.values()):
                if job.status is None and job.deadline <= now and not job.timed_out:
                    job.timed_out = True
                    self.kill_tree(job)
                if job.status is not None and (not any(self.open_streams(job)) or now >= job.ended + LINGER_S):
                    self.finish(job)

    def next_wait_ms(self) -> int | None:
        moments = list(self.paused.values())
        for job in self.jobs.values():
            if job.status is not None:
                moments.append(job.ended + LINGER_S)
            elif not job.timed_out:
                moments.append(job.deadline)
        if not moments:
            return None
        return max(0, int((min(moments) - monotonic()) * 1000) + 1)

    def receive(self) -> bool:
        try:
            data = posix.read(self.control, 1 << 18)
        except BlockingIOError:
            return True
        self.inbox += data
        while len(self.inbox) >= 4:
            end = 4 + int.from_bytes(self.inbox[:4], "little")
            if len(self.inbox) < end:
                break
            kind, request, fields = unpack(bytes(self.inbox[4:end]))
            del self.inbox[:end]
            self.answer(kind, request, fields)
        return bool(data)

    def answer(self, kind: int, request: int, fields: list[bytes]) -> None:
        try:
            if kind == RUN:
                self.run(request, fields)
            elif kind == READ:
                self.send(DATA, request, read_file(fields[0], int(fields[1])))
            elif kind == WRITE:
                write_file(fields[0], int(fields[1]), fields[2])
                self.send(WROTE, request)
            elif kind == CANCEL:
                for job in self.jobs.values():
                    if job.request == request and job.status is None:
                        job.deadline = 0.0
        except OSError as error:
            self.send(FAILED, request, error.errno or _EINVAL, why(error))

    def send(self, kind: int, request: int, *fields: bytes | int) -> None:
        self.outbox += pack(kind, request, *fields)
        self.flush()

    def flush(self) -> None:
        try:
            while self.outbox:
                del self.outbox[: posix.write(self.control, self.outbox)]
        except BlockingIOError:
            pass
        self.poller.modify(self.control, select.POLLIN | (select.POLLOUT if self.outbox else 0))

    # -- commands

    def run(self, request: int, fields: list[bytes]) -> None:
        timeout_s, cpu_s, keep = float(fields[0]), fields[1], int(fields[2])
        cwd, stdin, count = fields[3], fields[4], int(fields[5])
        argv, environment = fields[6 : 6 + count], fields[6 + count :]
        env = dict(pair.split(b"=", 1) for pair in environment)
        started, start_tick = monotonic(), int(clock_gettime(_CLOCK_BOOTTIME) * self.ticks)
        pipes: list[tuple[int, int]] = []
        try:
            for _ in range(3 if stdin else 2):
                pipes.append(posix.pipe2(posix.O_CLOEXEC))
            pid, reason, status = self.spawn(argv, env, cwd, pipes)
        except OSError as error:  # too many commands at once
            pid, reason, status = None, b"cannot start: " + why(error) + b"\n", 126
        if pid is None:
            for fd in [fd for pipe in pipes for fd in pipe]:
                posix.close(fd)
            self.send(DONE, request, status, 0, 0, b"", 0, reason[:keep], 0)
            return
        ours, theirs = [out for out, _ in pipes[:2]], [into for _, into in pipes[:2]]
        if stdin:
            ours, theirs = [*ours, pipes[2][1]], [*theirs, pipes[2][0]]
        for fd in theirs:
            posix.close(fd)
        for fd in ours:
            posix.set_blocking(fd, False)
        if cpu_s:
            pair = int(cpu_s).to_bytes(8, sys.byteorder) * 2
            c_call("prlimit", pid, _RLIMIT_CPU, pair, 0)
        streams = [Stream(fd, keep) for fd in ours[:2]]
        job = Job(request, pid, streams, ours[2] if stdin else None, stdin, timeout_s, start_tick, started)
        self.jobs[pid] = job
        for stream in streams:
            self.readers[stream.fd] = (job, stream)
            self.poller.register(stream.fd, select.POLLIN)
        if stdin:
            self.writers[ours[2]] = job
            self.poller.register(ours[2], select.POLLOUT)
            self.feed(job)

    def spawn(
        self, argv: list[bytes], env: dict[bytes, bytes], cwd: bytes, pipes: list[tuple[int, int]]
    ) -> tuple[int | None, bytes, int]:
        """(pid, b"", 0), or (None, why, exit status of a shell in that case)."""
        actions = [
            (posix.POSIX_SPAWN_DUP2, pipes[2][0], 0)
            if len(pipes) > 2
            else (posix.POSIX_SPAWN_OPEN, 0, _STDIO_NULL, posix.O_RDONLY, 0),
            (posix.POSIX_SPAWN_DUP2, pipes[0][1], 1),
            (posix.POSIX_SPAWN_DUP2, pipes[1][1], 2),
        ]
        try:
            posix.chdir(cwd)
        except OSError as error:
            return None, b"cannot enter " + cwd + b": " + why(error) + b"\n", 126
        reason, status = argv[0] + b": command not found\n", 127
        try:
            for program in candidates(argv[0], env):
                try:
                    pid = posix.posix_spawn(
                        program, argv, env, file_actions=actions, setsid=True, setsigdef=(_SIGPIPE, _SIGXFSZ, _SIGINT)
                    )
                    return pid, b"", 0
                except OSError as error:
                    if error.errno != _ENOENT:
                        reason, status = program + b": " + why(error) + b"\n", 126
        finally:
            posix.chdir("/")  # never keep a directory of the workspace busy
        return None, reason, status

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
            self.poller.unregister(job.stdin_fd)
            del self.writers[job.stdin_fd]
            posix.close(job.stdin_fd)
            job.stdin_fd = None

    def read_output(self, fd: int) -> None:
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

    def pause(self, fd: int) -> None:
        self.poller.unregister(fd)
        self.paused[fd] = monotonic() + FLOOD_PAUSE_S

    def drop_reader(self, fd: int) -> None:
        if self.paused.pop(fd, None) is None:
            self.poller.unregister(fd)
        del self.readers[fd]
        posix.close(fd)

    def open_streams(self, job: Job) -> list[bool]:
        owners = [self.readers.get(stream.fd) for stream in job.streams]
        return [owner is not None and owner[0] is job for owner in owners]

    def reap(self) -> None:
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            job = self.jobs.get(pid)
            if job is not None:
                job.status, job.ended = posix.waitstatus_to_exitcode(status), monotonic()

    def finish(self, job: Job) -> None:
        del self.jobs[job.pid]
        self.close_stdin(job)
        for stream, is_open in zip(job.streams, self.open_streams(job), strict=True):
            if is_open:  # a background process holds it
                self.readers[stream.fd] = None
        left = [fd for fd, owner in self.readers.items() if owner is None]
        for fd in left[:-DRAINED_PIPES]:
            self.drop_reader(fd)
        out, err = job.streams
        took_us = int((job.ended - job.started) * 1e6)
        assert job.status is not None
        self.send(
            DONE,
            job.request,
            job.status,
            int(job.timed_out),
            took_us,
            out.value(),
            out.dropped,
            err.value(),
            err.dropped,
        )

    def kill_tree(self, job: Job) -> None:
        """Kills the command and whatever it started, however it hid: its own session, orphans, new sessions.

        A process belongs to the command when its line of parents ends at the command, or at an orphan that is younger
        than the command and not another command. What earlier commands left running is spared.
        """
        kill(-job.pid)
        signalled: set[int] = set()
        deadline = monotonic() + KILL_S
        while True:
            self.reap()
            table = process_table()
            victims = {pid for pid in table if self.belongs(pid, table, job)}
            # A child of a process that has its signal was there before it: the next look finds it.
            new = victims - signalled
            if not victims or (monotonic() > deadline and not new):
                return
            if monotonic() > deadline:
                kill(-1)
                return
            for pid in new:
                kill(pid)
            signalled |= new
            if not new:
                sleep(0.001)  # they have their signal, and need a moment to die of it

    def belongs(self, pid: int, table: dict[int, tuple[int, int]], job: Job) -> bool:
        top = pid
        for _ in table:  # bounded: a pid that is reused while the table is read could close a circle
            if table[top][0] not in table:
                break
            top = table[top][0]
        if top == job.pid:
            return True
        return top not in self.jobs and table[top][1] >= job.start_tick


def why(error: OSError) -> bytes:
    return str(error.strerror or error).encode()


def candidates(name: bytes, env: dict[bytes, bytes]) -> list[bytes]:
    if b"/" in name:
        return [name]
    return [folder + b"/" + name for folder in env.get(b"PATH", b"").split(b":") if folder]


def kill(pid: int) -> None:
    try:  # noqa: SIM105 (contextlib is a slow import)
        posix.kill(pid, _SIGKILL)
    except ProcessLookupError:
        pass


def process_table() -> dict[int, tuple[int, int]]:
    """pid -> (parent, start in clock ticks since boot) of every living process but this one."""
    table: dict[int, tuple[int, int]] = {}
    for name in posix.listdir("/proc"):
        if not name.isdigit() or name == "1":
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
        if fields[0] not in (b"Z", b"X"):
            table[int(name)] = (int(fields[1]), int(fields[19]))
    return table


def regular(fd: int) -> None:
    if posix.fstat(fd).st_mode & 0o170000 != 0o100000:
        raise OSError(_EINVAL, "not a regular file")


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
        raise OSError(_EFBIG, f"larger than {max_bytes} bytes")
    finally:
        posix.close(fd)


def write_file(path: bytes, mode: int, data: bytes) -> None:
    at = path.find(b"/", 1)
    while at > 0:
        try:  # noqa: SIM105
            posix.mkdir(path[:at], 0o755)
        except OSError:
            pass  # there already, or the open below says why it cannot be
        at = path.find(b"/", at + 1)
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


def main() -> None:
    control = posix.dup(0)  # close-on-exec, like everything that Python opens
    posix.dup2(posix.open(_STDIO_NULL, posix.O_RDONLY), 0)
    posix.set_blocking(control, False)
    pairs = [argument.split("=") for argument in sys.argv[1:]]
    Rocklet(control, [(int(number), int(value)) for number, value in pairs]).serve()


if __name__ == "__main__":
    main()
