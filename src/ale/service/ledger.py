"""The ledger: what was asked under which key, what became of it. This is how a request is carried out exactly once.

Work belongs to the ledger and not to a connection: it goes on when the client is cut off, and whoever asks under its
key gets the one answer. A key that was cancelled before its request arrived stays refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from ale.sandbox.wire import Conflict, TooMany, UnknownName

logger = logging.getLogger(__name__)

MAX_ANSWERS = 1024
MAX_ANSWER_BYTES = 64 << 20
_MAX_KEYS = 65536  # of answers that are no longer kept, or never came: some 10 MB
_MAX_RUNNING = 1024
_CANCEL_S = 30.0

Answer = tuple[int, bytes]
"""Status and body."""
Work = Callable[[], Awaitable[Answer]]


class _Asked:
    def __init__(self, fingerprint: bytes, task: asyncio.Task[Answer]) -> None:
        self.fingerprint = fingerprint
        self.task = task


class Ledger:
    """Of one tenant. Answers are kept until there are too many; their keys are remembered far longer."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._answered: OrderedDict[str, int] = OrderedDict()  # key -> bytes of the answer
        self._answer_bytes = 0
        self._spent: OrderedDict[str, str] = OrderedDict()  # key -> why there is no answer
        self._closed = False

    def begin(self, key: str, fingerprint: bytes, work: Work) -> asyncio.Task[Answer] | None:
        """Starts `work` unless it was started under this key before. Raises Conflict when the key has another use, or
        was cancelled, or its answer was given up. What it returns is the ledger's; None: there was nothing to start."""
        if (asked := self._asked.get(key)) is not None:
            if asked.fingerprint != fingerprint:
                raise Conflict(f"the key {key} was used for another request")
            return None
        self._refuse_spent(key)
        if self._closed:
            raise Conflict("the service is closing")
        if len(self._asked) - len(self._answered) >= _MAX_RUNNING:
            raise TooMany(f"{_MAX_RUNNING} requests of this token are running: wait for some")
        task = asyncio.ensure_future(work())
        self._asked[key] = _Asked(fingerprint, task)
        task.add_done_callback(lambda done: self._note(key, done))
        return task

    async def answer(self, key: str, wait_s: float) -> Answer | None:
        """What came of the request; None: it is not done yet."""
        asked = self._asked.get(key)
        if asked is None:
            self._refuse_spent(key)
            raise UnknownName(f"nothing was asked under the key {key}")
        await asyncio.wait([asked.task], timeout=wait_s)
        if not asked.task.done():
            return None
        if asked.task.cancelled():
            raise Conflict(f"the request {key} was cancelled")
        return asked.task.result()

    async def cancel(self, key: str) -> bool:
        """Ends the work, or sees to it that it never begins. Returns when it is over; whether it was running."""
        asked = self._asked.get(key)
        if asked is None:
            self._spend(key, "was cancelled")
            return False
        running = not asked.task.done()
        if running:
            asked.task.cancel()
            await asyncio.wait([asked.task], timeout=_CANCEL_S)
        self._forget(key, "was cancelled")
        return running

    async def close(self) -> None:
        """Ends all work; what does not end in time is named in the log."""
        self._closed = True
        tasks = {asked.task: key for key, asked in self._asked.items()}
        for task in tasks:
            task.cancel()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=_CANCEL_S)
            if stuck:
                keys = ", ".join(sorted(tasks[task] for task in stuck))
                logger.error("requests that were cancelled did not end within %g s: %s", _CANCEL_S, keys)
        self._asked.clear()

    def _note(self, key: str, task: asyncio.Task[Answer]) -> None:
        if key not in self._asked or self._asked[key].task is not task:
            return
        if task.cancelled() or task.exception() is not None:
            self._forget(key, "was cancelled")
            return
        self._answered[key] = size = len(task.result()[1])
        self._answer_bytes += size
        while len(self._answered) > MAX_ANSWERS or self._answer_bytes > MAX_ANSWER_BYTES:
            if len(self._answered) == 1:
                break  # the newest answer is always kept
            self._forget(next(iter(self._answered)), "was done, and its answer is no longer kept")

    def _forget(self, key: str, why: str) -> None:
        self._asked.pop(key, None)
        self._answer_bytes -= self._answered.pop(key, 0)
        self._spend(key, why)

    def _spend(self, key: str, why: str) -> None:
        self._spent[key] = why
        if len(self._spent) > _MAX_KEYS:
            self._spent.popitem(last=False)

    def _refuse_spent(self, key: str) -> None:
        if (why := self._spent.get(key)) is not None:
            raise Conflict(f"the request {key} {why}")
