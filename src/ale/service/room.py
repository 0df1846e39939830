"""Room in memory for the bodies of requests: taken before one is read, given back when its work is over."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from ale.sandbox.wire import TooMany

# What takes no room: JSON of ordinary size, which the number of requests bounds.
SMALL_BYTES = 64 << 10


class Taken:
    def __init__(self, room: Room, size: int) -> None:
        self._room, self._size, self.lent = room, size, False

    def lend(self, task: asyncio.Task[Any]) -> None:
        """It is released when `task` is over."""
        self.lent = True
        task.add_done_callback(lambda _: self.release())

    def release(self) -> None:
        """Idempotent."""
        size, self._size = self._size, 0
        self._room.give_back(size)


class Room:
    """Of one tenant. Whoever asks first gets it first, so that a large body is not overtaken by small ones for ever."""

    def __init__(self, size: int) -> None:
        self.size = self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int, deadline_s: float) -> Taken:
        """Raises TooMany when there is none in time."""
        if size <= SMALL_BYTES:
            return Taken(self, 0)
        size = min(size, self.size)
        if not self._waiting and size <= self._free:
            self._free -= size
            return Taken(self, size)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        taken = Taken(self, size)
        try:
            async with asyncio.timeout(deadline_s):
                await turn
        except BaseException as error:
            if (size, turn) in self._waiting:
                self._waiting.remove((size, turn))
                self._hand_out()
            else:  # it came at the last moment
                taken.release()
            if isinstance(error, TimeoutError):
                raise TooMany(
                    f"the requests of this token hold {self.size} bytes in memory: wait for some, or upload a tree"
                ) from error
            raise
        return taken

    def give_back(self, size: int) -> None:
        self._free += size
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting.popleft()
            self._free -= size
            if not turn.done():
                turn.set_result(None)  # else whoever waited is about to give it back
