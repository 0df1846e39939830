"""Evaluations beside training (`eval.beside`): one after the other, while the trainer goes on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from ale.actor import Actor
from ale.errors import Interrupted


class Evaluator(Actor):
    """`evaluate` makes the evaluation that is due after an update, and records it."""

    def __init__(self, evaluate: Callable[[int], Awaitable[object]]) -> None:
        super().__init__("evaluator", capacity=1)
        self._evaluate = evaluate
        self._due: deque[int] = deque()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def due(self, update: int) -> None:
        if update not in self._due:
            self._due.append(update)
            self._idle.clear()
            self._changed.set()

    async def drained(self) -> None:
        """Returns when nothing is due any more."""
        what = f"the evaluations of the updates {', '.join(map(str, self._due))}"
        async with self.bus.waiting(what, on="actor evaluator"):
            await self._idle.wait()

    async def run(self) -> None:
        try:
            while True:
                while self._due:
                    await self._evaluate(self._due[0])
                    self._due.popleft()
                self._idle.set()
                self._changed.clear()
                async with self.bus.waiting("a message in the inbox: an evaluation that is due"):
                    await self._changed.wait()
        except Interrupted:
            pass  # the run ends, and says so itself; a resumed one finds what is still due
