"""Who may ask the engine next: so many at once, and among those who wait, episode after episode in turn.

An episode that sends a hundred requests waits behind itself, not in front of the others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ale.proxy.dialogue import Refusal


class Turnstile:
    """`places` requests pass at once; of each episode at most `waiting` wait, and one more is refused."""

    def __init__(self, places: int, *, waiting: int = 64) -> None:
        if places < 1 or waiting < 1:
            raise ValueError(f"Turnstile: places and waiting must be at least 1, got {places} and {waiting}")
        self._free = places
        self._waiting = waiting
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def passing(self, episode: str, *, deadline_s: float) -> AsyncIterator[None]:
        """Raises `Refusal` (429 when too many of the episode wait, 503 when the deadline passes)."""
        await self._enter(episode, deadline_s)
        try:
            yield
        finally:
            self._leave()

    @property
    def queued(self) -> int:
        return sum(map(len, self._queues.values()))

    async def _enter(self, episode: str, deadline_s: float) -> None:
        if self._free and not self._queues:
            self._free -= 1
            return
        queue = self._queues.setdefault(episode, deque())
        if len(queue) >= self._waiting:
            raise Refusal(429, f"{len(queue)} requests of this episode wait already", kind="rate_limit_error")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(place)
        try:
            async with asyncio.timeout(deadline_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._leave()  # the place came together with the cancellation: it goes to the next
            else:
                self._forget(episode, place)
            if isinstance(error, TimeoutError):
                raise Refusal(503, f"no place at the engine within {deadline_s:g} s", kind="server_error") from error
            raise

    def _leave(self) -> None:
        while self._queues:
            episode, queue = next(iter(self._queues.items()))
            place = queue.popleft()
            if queue:
                self._queues.move_to_end(episode)
            else:
                del self._queues[episode]
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def _forget(self, episode: str, place: asyncio.Future[None]) -> None:
        queue = self._queues.get(episode)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._queues[episode]
