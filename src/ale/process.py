"""A worker process: requests in, answers out, over one socket, and no way to outlive its parent.

The parent side is `WorkerProcess`: `await worker.ask(request, deadline_s=...)`. The child side is `serve`, which a
module that runs as `python -m MODULE FD` calls with that descriptor. Frames are a length, a request number and a
msgpack struct; tensors do not travel here but through shared memory whose file descriptor the child inherits.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol, Union

import msgspec

from ale import errors
from ale.errors import AleError, DeadlineExceeded, UserError, WorkerDied
from ale.heart import Beat, Heart
from ale.vitals import ProcessState, look
from ale.waiting import named, register
from ale.wire import Message, Reply, Request, encode, reply_type

_HEADER = struct.Struct("<IQB")  # body length, request number, kind
_REQUEST, _ANSWER, _FAILURE, _BEAT = 0, 1, 2, 3
_PR_SET_PDEATHSIG = 1
_MAX_FRAME = 1 << 30  # more than any message: a longer frame is noise on the socket
_STDERR_BYTES = 8192
_GRACE_S = 5.0  # to end after the socket was closed, before it is killed
_LAST_WORDS_S = 1.0


def request_frame(request: msgspec.Struct) -> bytes:
    """A request as `Requests` takes it, for a parent that does not wait for answers."""
    body = encode(request)
    return _HEADER.pack(len(body), 0, _REQUEST) + body


class Failure(msgspec.Struct, frozen=True):
    """`Failure(kind="ValueError", text="...")`: what a worker answers when the work raised."""

    kind: str
    text: str


class WorkerProcess:
    """Owns a child process. Use `async with WorkerProcess(...)`; leaving it ends the child.

    `name` is what waits for it and `ale why` call it: by default the module's, "engine" for `engine_process`.
    """

    def __init__(
        self,
        module: str,
        *,
        error: type[AleError],
        pass_fds: Sequence[int] = (),
        env: dict[str, str] | None = None,
        name: str = "",
    ) -> None:
        self._module = module
        self.name = name or module.rpartition(".")[2].removesuffix("_process")
        self._beat: Beat | None = None
        self._beat_at = 0.0
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._error = error
        self._pass_fds = tuple(pass_fds)
        self._env = env or {}
        self._pending: dict[int, tuple[asyncio.Future[Any], Any]] = {}
        self._number = 0
        self._stderr = b""
        self._garbled = ""

    async def __aenter__(self) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            try:
                self._process = subprocess.Popen(  # noqa: ASYNC220  a vfork: milliseconds, once
                    [sys.executable, "-m", self._module, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(), *self._pass_fds),
                    env=os.environ | self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
            except BaseException:
                self._writer.close()
                raise
        register().processes[self.name] = self.state
        self._answers = asyncio.create_task(self._read_answers(), name=f"answers of {self._module}")
        self._errors = asyncio.create_task(self._read_stderr(), name=f"stderr of {self._module}")
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Closing the socket tells the child to end; a child that does not, or has no time to, is killed."""
        self._writer.close()
        processes = register().processes
        if processes.get(self.name) == self.state:
            del processes[self.name]
        try:
            with named(f"the end of process {self.name}", deadline_s=_GRACE_S, release="its end, or SIGKILL"):
                await asyncio.wait({self._end()}, timeout=_GRACE_S)
        finally:
            self._process.kill()  # nothing where it has ended
            self._process.wait()
            self._writer.transport.abort()  # what a stuck child never read would keep the socket open
            self._answers.cancel()
            self._errors.cancel()
            await asyncio.gather(self._answers, self._errors, return_exceptions=True)
            with suppress(OSError):
                await self._writer.wait_closed()
            if self._process.stderr is not None:
                self._process.stderr.close()

    def _end(self) -> asyncio.Future[int]:
        return asyncio.get_running_loop().run_in_executor(None, self._process.wait)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: every request in flight raises `WorkerDied`."""
        self._process.kill()

    def state(self) -> ProcessState:
        """How it is, by the kernel's word and by its own."""
        now = asyncio.get_running_loop().time()
        beat, ago = self._beat, now - self._beat_at
        return ProcessState(
            name=self.name,
            pid=self.pid,
            vitals=look(self.pid),
            beat_s=ago if beat is not None else None,
            doing=beat.doing if beat is not None else "",
            doing_s=beat.doing_s + ago if beat is not None and beat.doing else 0.0,
            step_s=beat.step_s + ago if beat is not None else 0.0,
            steps=beat.steps if beat is not None else 0,
            asked=len(self._pending),
            in_hand=beat.in_hand if beat is not None else None,
            busy_s=self._busy_s + (now - self._busy_since if self._pending else 0.0),
        )

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        """Sends `request` and waits for its answer.

        Raises the worker's error class when the work failed, `WorkerDied` when the process ended and
        `DeadlineExceeded` when it did not answer in time.
        """
        if self._answers.done():
            raise self._death()
        self._number += 1
        number = self._number
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._pending:
            self._busy_since = loop.time()
        self._pending[number] = (future, reply_type(type(request)))
        what = f"the answer of process {self.name} to {type(request).__name__}"
        try:
            body = encode(request)
            self._writer.write(_HEADER.pack(len(body), number, _REQUEST) + body)
            with named(what, on=f"process {self.name}", deadline_s=deadline_s):
                async with asyncio.timeout(deadline_s) as scope:
                    answer: Reply = await future
            return answer
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"{type(request).__name__} to {self._module}", deadline_s) from error
        finally:
            self._pending.pop(number, None)
            if not self._pending:
                self._busy_s += loop.time() - self._busy_since

    async def _read_answers(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                with named(f"a frame of process {self.name}", idle=True):
                    head = await self._reader.readexactly(_HEADER.size)
                length, number, kind = _HEADER.unpack(head)
                if kind not in (_ANSWER, _FAILURE, _BEAT) or length > _MAX_FRAME:
                    raise msgspec.DecodeError(f"a frame of kind {kind} and {length} bytes")
                body = await self._reader.readexactly(length)
                if kind == _BEAT:
                    self._beat, self._beat_at = msgspec.msgpack.decode(body, type=Beat), loop.time()
                    continue
                future, type_ = self._pending.get(number, (None, None))
                if future is None or future.done():
                    continue  # whoever asked has gone
                if kind == _FAILURE:
                    failure = msgspec.msgpack.decode(body, type=Failure)
                    future.set_exception(self._raised(failure))
                else:
                    future.set_result(msgspec.msgpack.decode(body, type=type_))
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._last_words()
        except msgspec.DecodeError as error:  # what follows on the socket means nothing any more
            self._garbled = f"; it was killed, for what it sent is no answer: {error}"
            self._process.kill()
            await self._last_words()
        finally:
            for future, _ in self._pending.values():
                if not future.done():
                    future.set_exception(self._death())

    def _raised(self, failure: Failure) -> AleError:
        """What the user can mend is that on this side too; anything else is an error of this worker."""
        kind = getattr(errors, failure.kind, None)
        if isinstance(kind, type) and issubclass(kind, UserError):
            return kind(failure.text)
        return self._error(f"{failure.kind}: {failure.text}")

    async def _read_stderr(self) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), self._process.stderr
        )
        try:
            with named(f"what process {self.name} prints", idle=True):
                while data := await stream.read(1 << 16):
                    self._stderr = (self._stderr + data)[-_STDERR_BYTES:]
        finally:
            transport.close()

    async def _last_words(self) -> None:
        """The socket closes before the process has ended and all it printed has been read: waits for both, briefly."""
        both: set[asyncio.Future[Any]] = {self._end(), self._errors}
        await asyncio.wait(both, timeout=_LAST_WORDS_S)

    def _death(self) -> WorkerDied:
        said = self._stderr.decode(errors="replace").strip() or "it printed nothing"
        code = self._process.poll()
        return WorkerDied(f"the worker {self._module} ended (exit code {code}){self._garbled}; its last words:\n{said}")


class Requests:
    """The child's side of the socket: takes requests, sends answers. Blocking; one thread."""

    def __init__(self, fd: int, kinds: Sequence[type[Message]]) -> None:
        _die_with_parent()
        self._socket = socket.socket(fileno=fd)
        self._decoder = msgspec.msgpack.Decoder(Union[tuple(kinds)])  # noqa: UP007  a union of a run-time list
        self._buffer = bytearray()
        self._sending = threading.Lock()  # the heart beats from a thread of its own

    def take(self, *, block: bool) -> list[tuple[int, Any]]:
        """The requests that have arrived: waits for one if `block`. Raises `EOFError` when the parent has gone."""
        found = self._parse()
        while True:
            try:
                data = self._socket.recv(1 << 20, 0 if block and not found else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            if not data:
                raise EOFError
            self._buffer += data
            found += self._parse()

    def answer(self, number: int, reply: msgspec.Struct | None) -> None:
        self._send(number, _ANSWER, msgspec.msgpack.encode(reply))

    def fail(self, number: int, error: Exception) -> None:
        self._send(number, _FAILURE, encode(Failure(type(error).__name__, str(error))))

    def _send(self, number: int, kind: int, body: bytes) -> None:
        with self._sending:
            self._socket.sendall(_HEADER.pack(len(body), number, kind) + body)

    def beat(self, beat: Beat) -> None:
        """Raises `OSError` when the parent has gone."""
        self._send(0, _BEAT, msgspec.msgpack.encode(beat))

    def _parse(self) -> list[tuple[int, Any]]:
        found = []
        while len(self._buffer) >= _HEADER.size:
            length, number, _ = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            found.append((number, self._decoder.decode(memoryview(self._buffer)[_HEADER.size : end])))
            del self._buffer[:end]
        return found


class Service(Protocol):
    """What a worker does, once it is open. Numbers are those of requests; an exception is the answer of a failure."""

    @property
    def busy(self) -> bool:
        """Whether `step` has work to do; where it has not, the next request is waited for."""

    def handle(self, number: int, request: Any) -> Iterable[tuple[int, msgspec.Struct | Exception | None]]:
        """The answers that this request brings about, its own or others'; later ones come from `step`."""

    def step(self, moved: Callable[[], None]) -> Iterable[tuple[int, msgspec.Struct]]:
        """A piece of work between two looks at what has arrived. One that may last calls `moved` after each part."""


def serve(fd: int, kinds: Sequence[type[Message]], open_: Callable[[Any], tuple[Service, msgspec.Struct]]) -> None:
    """The main loop of a worker. The first request opens the service; ends when the parent has gone.

    What goes wrong with a request goes to whoever asked, and the worker serves on; one that cannot open ends.
    """
    requests = Requests(fd, kinds)
    with suppress(EOFError), Heart(requests.beat) as heart:
        (first, settings), *rest = requests.take(block=True)
        assert not rest, "the parent waits for the worker to open"
        try:
            with heart.doing(type(settings).__name__):
                service, opened = open_(settings)
        except Exception as error:
            requests.fail(first, error)
            return
        requests.answer(first, opened)
        while True:
            for number, request in requests.take(block=not service.busy):
                heart.took()
                try:
                    with heart.doing(type(request).__name__):
                        answers = list(service.handle(number, request))
                except Exception as error:
                    answers = [(number, error)]
                for answered, answer in answers:
                    heart.gave()
                    if isinstance(answer, Exception):
                        requests.fail(answered, answer)
                    else:
                        requests.answer(answered, answer)
            if service.busy:
                with heart.doing("a step"):
                    finished = service.step(heart.moved)
                for number, answer in finished:
                    heart.gave()
                    requests.answer(number, answer)


def _die_with_parent() -> None:
    """SIGKILL of the parent must not leave a worker in the middle of a long step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
