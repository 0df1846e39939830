"""The wish of whoever runs `ale` that it end: heard where the run can stop without leaving anything half done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ale.errors import Interrupted
from ale.waiting import named

T = TypeVar("T")


class Stop:
    """`request` it from a signal handler; the run passes `check` between steps and waits through `unless`."""

    def __init__(self) -> None:
        self._requested = asyncio.Event()

    def request(self) -> None:
        self._requested.set()

    def check(self) -> None:
        """Raises `Interrupted` once the end was requested."""
        if self._requested.is_set():
            raise Interrupted("stopped on request")

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; when the end is requested first, `work` is cancelled and `Interrupted` is raised."""
        caller = asyncio.current_task()
        name = caller.get_name() if caller is not None else None  # a wait is named after whoever waits
        working = asyncio.create_task(work, name=name)
        stopped = asyncio.create_task(self._asked_for(), name="the request to stop")
        try:
            with named("its own work", idle=True):  # which says itself what it waits for
                await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Interrupted("stopped on request")
            return working.result()
        finally:
            stopped.cancel()
            working.cancel()
            with named(f"the end of the cancelled {name}"):  # a task of ours: what it closes has deadlines
                await asyncio.gather(working, stopped, return_exceptions=True)

    async def _asked_for(self) -> None:
        with named("the request to stop", idle=True):
            await self._requested.wait()
