"""How late the event loop runs its timers: while a training step runs, the 99th percentile stays below 50 ms."""

from __future__ import annotations

import asyncio

import numpy as np

from ale.actor import Actor
from ale.waiting import named

_PERIOD_S = 0.01
_KEEP = 100_000  # 1000 s of samples


class LoopLag(Actor):
    def __init__(self) -> None:
        super().__init__("loop_lag", capacity=1)
        self._seen_N = np.empty(_KEEP)  # asked for every second: of a list it would take 20 ms
        self._count = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _PERIOD_S
            with named("its period", idle=True):
                await asyncio.sleep(_PERIOD_S)
            self._keep(loop.time() - due)

    def _keep(self, late_s: float) -> None:
        self._seen_N[self._count % _KEEP] = late_s
        self._count += 1

    def quantile_ms(self, share: float) -> float:
        """Of the last 1000 s."""
        return float(np.quantile(self._seen_N[: self._count], share)) * 1000 if self._count else 0.0
