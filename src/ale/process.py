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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol, Union

import msgspec

from ale import errors
from ale.errors import AleError, DeadlineExceeded, UserError, WorkerDied
from ale.wire import Message, Reply, Request, encode, reply_type

_HEADER = struct.Struct("<IQB")  # body length, request number, kind
_REQUEST, _ANSWER, _FAILURE = 0, 1, 2
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
    """Owns a child process. Use `async with WorkerProcess(...)`; leaving it ends the child."""

    def __init__(
        self, module: str, *, error: type[AleError], pass_fds: Sequence[int] = (), env: dict[str, str] | None = None
    ) -> None:
        self._module = module
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
        self._answers = asyncio.create_task(self._read_answers(), name=f"answers of {self._module}")
        self._errors = asyncio.create_task(self._read_stderr(), name=f"stderr of {self._module}")
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Closing the socket tells the child to end; a child that does not, or has no time to, is killed."""
        self._writer.close()
        try:
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

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        """Sends `request` and waits for its answer.

        Raises the worker's error class when the work failed, `WorkerDied` when the process ended and
        `DeadlineExceeded` when it did not answer in time.
        """
        if self._answers.done():
            raise self._death()
        self._number += 1
        number = self._number
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = (future, reply_type(type(request)))
        try:
            body = encode(request)
            self._writer.write(_HEADER.pack(len(body), number, _REQUEST) + body)
            async with asyncio.timeout(deadline_s) as scope:
                answer: Reply = await future
            return answer
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"{type(request).__name__} to {self._module}", deadline_s) from error
        finally:
            self._pending.pop(number, None)

    async def _read_answers(self) -> None:
        try:
            while True:
                length, number, kind = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
                if kind not in (_ANSWER, _FAILURE) or length > _MAX_FRAME:
                    raise msgspec.DecodeError(f"a frame of kind {kind} and {length} bytes")
                body = await self._reader.readexactly(length)
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
        self._socket.sendall(_HEADER.pack(len(body), number, kind) + body)

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

    def step(self) -> Iterable[tuple[int, msgspec.Struct]]:
        """A piece of work between two looks at what has arrived."""


def serve(fd: int, kinds: Sequence[type[Message]], open_: Callable[[Any], tuple[Service, msgspec.Struct]]) -> None:
    """The main loop of a worker. The first request opens the service; ends when the parent has gone.

    What goes wrong with a request goes to whoever asked, and the worker serves on; one that cannot open ends.
    """
    requests = Requests(fd, kinds)
    with suppress(EOFError):
        (first, settings), *rest = requests.take(block=True)
        assert not rest, "the parent waits for the worker to open"
        try:
            service, opened = open_(settings)
        except Exception as error:
            requests.fail(first, error)
            return
        requests.answer(first, opened)
        while True:
            for number, request in requests.take(block=not service.busy):
                try:
                    answers = list(service.handle(number, request))
                except Exception as error:
                    answers = [(number, error)]
                for answered, answer in answers:
                    if isinstance(answer, Exception):
                        requests.fail(answered, answer)
                    else:
                        requests.answer(answered, answer)
            if service.busy:
                for number, answer in service.step():
                    requests.answer(number, answer)


def _die_with_parent() -> None:
    """SIGKILL of the parent must not leave a worker in the middle of a long step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
