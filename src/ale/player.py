"""A recording as the tape of a run: whoever reaches a point waits until it is that point's turn.

What follows a point runs until it waits again, before the next point is passed: that is how the recorded run went, for
a point never suspends there. When the point whose turn it is is reached by nobody, though everybody else waits, the run
has diverged from its recording; that is seen at once, for nothing is timed.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import msgspec

from ale import errors
from ale.data.recording import Answer, Entry
from ale.errors import ActorStopped, AleError, Diverged
from ale.tape import Point

Key = tuple[str, str]
# Turns of the event loop: far more than lie between a point and the next one that anybody reaches.
_STILL = 1000
# Turns that a cancellation gets to reach whoever waits, before the end of the wait is put down to a deadline.
_HEAR = 50
_NAMED = 6


class Player:
    """A `Tape`. `entries` are those of one life of the run, after its "life"."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._left = (entry for entry in entries if entry.kind not in ("life", "task"))
        self._waiting: dict[Key, deque[asyncio.Future[Entry]]] = {}
        self._cancelled = Counter[Key]()
        self._cut_off: list[asyncio.Future[Entry]] = []
        self._head: Entry | None = None
        """What has its turn; None while whoever it was served to has not woken up, and at the end."""
        self._free = self._killed = False
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.passed = -1
        self.over = asyncio.Event()
        """Set when every point has been passed."""
        self._advance()

    # Tape

    def covers(self, rollout: str) -> bool:
        return True

    async def reach(self, point: Point, name: str) -> None:
        await self._turn((point, name))

    async def answer(self, point: Point, name: str, ask: Callable[[], Awaitable[Any]], type_: Any) -> Any:
        entry = await self._turn((point, name))
        if entry is None:
            raise ActorStopped("the recording is over")
        answer = entry.answer
        assert isinstance(answer, Answer)
        if answer.error is not None:
            raise _error(*answer.error)
        if answer.given_up:
            if point == "play":  # has deadlines of its own: it was cut off by the end of the run
                await self._released()
            raise TimeoutError("it was not waited for any longer")
        return msgspec.msgpack.decode(answer.value, type=type_)

    # What is real in a replay

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work that takes time: meanwhile nobody reaches a point, and that is no divergence."""
        self._working += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._working -= 1
            if not self._working:
                self._idle.set()

    async def killed(self) -> NoReturn:
        """What is asked for now was cut off by the end of the recorded run: it never comes, and what the recording
        has after it, nothing came of."""
        self._killed = True
        await self._released()

    async def watch(self) -> None:
        """Returns when every point has been passed, or all that came to anything. Raises `Diverged`."""
        still, passed = 0, self.passed
        while not self.over.is_set():
            await self._idle.wait()
            await asyncio.sleep(0)
            still = still + 1 if passed == self.passed and not self._working else 0
            passed = self.passed
            if still > _STILL:
                if self._killed:
                    self.over.set()
                    return
                raise Diverged(self.said())

    def said(self) -> str:
        """What has its turn, and what was reached instead."""
        head = self._head
        wanted = f"{head.kind} {head.name}" if head is not None else "nothing"
        reached = [f"{kind} {name}" for (kind, name), line in self._waiting.items() if line]
        more = f" and {len(reached) - _NAMED} more" if len(reached) > _NAMED else ""
        return (
            f"after {self.passed} points the recording goes on with: {wanted}. The replay does not get there; it has "
            f"reached: {', '.join(reached[:_NAMED]) or 'no other'}{more}."
        )

    def release(self) -> None:
        """Lets everybody go who still waits: the run is being stopped."""
        self._free = True
        for line in (*self._waiting.values(), self._cut_off):
            for future in line:
                if not future.done():
                    future.set_exception(ActorStopped("the recording is over"))

    async def _released(self) -> NoReturn:
        future: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._cut_off.append(future)
        await future
        raise AssertionError("it ends by an exception")

    # In turn

    async def _turn(self, key: Key) -> Entry | None:
        if self._free:
            return None
        head = self._head
        if head is not None and key == (head.kind, head.name) and not _given_up(head):
            self._advance()
            return head
        future: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(future)
        if head is not None and key == (head.kind, head.name):
            self._hear(head, _HEAR)
        try:
            entry = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not self._free:
                self._advance()  # it was served, and is passed all the same
            else:
                self._forget(key, future)
                self._cancelled[key] += 1
            raise
        except ActorStopped:
            return None
        self._advance()
        return entry

    def _advance(self) -> None:
        """The next entry has its turn; whoever waits for it is woken."""
        self.passed += 1
        while True:
            head = self._head = next(self._left, None)
            if head is None:
                self.over.set()
                return
            key = (head.kind, head.name)
            if not (_given_up(head) and self._cancelled[key]):
                break
            self._cancelled[key] -= 1
        if self._waiting.get(key):
            if _given_up(head):
                self._hear(head, _HEAR)
            else:
                self._serve(head)

    def _serve(self, head: Entry) -> None:
        line = self._waiting[head.kind, head.name]
        while line:
            future = line.popleft()
            if not future.done():
                self._head = None
                future.set_result(head)
                return

    def _hear(self, head: Entry, turns: int) -> None:
        """The recorded wait was given up: by a cancellation, which then comes in this run too, or else a deadline."""
        if self._head is not head:
            return
        key = (head.kind, head.name)
        if self._cancelled[key]:
            self._cancelled[key] -= 1
            self._advance()
        elif turns:
            asyncio.get_running_loop().call_soon(self._hear, head, turns - 1)
        elif self._waiting.get(key):
            self._serve(head)

    def _forget(self, key: Key, future: asyncio.Future[Entry]) -> None:
        line = self._waiting.get(key)
        if line is not None and future in line:
            line.remove(future)


def _given_up(entry: Entry) -> bool:
    return isinstance(entry.answer, Answer) and entry.answer.given_up


def _error(kind: str, text: str) -> Exception:
    """The error that came from outside, of the class it had."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, AleError):
        error = found.__new__(found)
        error.args = (text,)
        return error
    if kind == "TimeoutError":
        return TimeoutError(text)
    return AleError(f"{kind}: {text}")
