"""A context manager held open by a task of its own, so that one place can enter it and another, later, leave it."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

from ale.errors import DeadlineExceeded
from ale.waiting import named

T = TypeVar("T")
_CLOSE_S = 180.0  # every step of a sandbox's end has a shorter deadline of its own


class Held(Generic[T]):
    """Entered at once. `value()` waits for that; `close()` leaves, or ends the attempt to enter."""

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self._released = asyncio.Event()
        self._entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._hold(manager))

    async def _hold(self, manager: AbstractAsyncContextManager[T]) -> None:
        try:
            async with manager as value:
                self._entered.set_result(value)
                with named("to be given back", idle=True):
                    await self._released.wait()
        except BaseException as error:
            if self._entered.done():
                raise
            if isinstance(error, asyncio.CancelledError):
                self._entered.cancel()
                raise
            self._entered.set_exception(error)
            self._entered.exception()

    async def value(self) -> T:
        return await asyncio.shield(self._entered)

    async def close(self) -> None:
        """Returns when the manager has been left; raises what leaving raised, and DeadlineExceeded. Idempotent."""
        self._released.set()
        if not self._entered.done():
            self._task.cancel()
        with named("the end of what is held open", deadline_s=_CLOSE_S, release="its own end"):
            done, _ = await asyncio.wait([self._task], timeout=_CLOSE_S)
        if not done:
            self._task.cancel()
            raise DeadlineExceeded("the end of what is held open", _CLOSE_S)
        self._entered.cancel()  # where the attempt was ended before it began: whoever waits for the value is told
        if not self._task.cancelled():
            self._task.result()
