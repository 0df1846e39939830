"""A context manager held open by a task of its own, so that one place can enter it and another, later, leave it."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

from ale.errors import DeadlineExceeded

T = TypeVar("T")

_LEAVE_S = 300.0  # a workspace of millions of files takes its time to go


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
        """Returns when the manager has been left; raises what leaving raised, and DeadlineExceeded when it is stuck.
        Idempotent."""
        self._released.set()
        if not self._entered.done():
            self._task.cancel()
        done, _ = await asyncio.wait([self._task], timeout=_LEAVE_S)
        if not done:
            raise DeadlineExceeded("the end of what was held open", _LEAVE_S)
        self._entered.cancel()  # where the attempt was ended before it began: whoever waits for the value is told
        if not self._task.cancelled():
            self._task.result()
