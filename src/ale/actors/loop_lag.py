"""How late the event loop runs its timers: while a training step runs, the 99th percentile stays below 50 ms."""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np

from ale.actor import Actor
from ale.waiting import named

_PERIOD_S = 0.01
_KEEP = 100_000  # 1000 s of samples


class LoopLag(Actor):
    def __init__(self) -> None:
        super().__init__("loop_lag", capacity=1)
        self._seen: deque[float] = deque(maxlen=_KEEP)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _PERIOD_S
            with named("its period", idle=True):
                await asyncio.sleep(_PERIOD_S)
            self._seen.append(loop.time() - due)

    def quantile_ms(self, share: float) -> float:
        return float(np.quantile(self._seen, share)) * 1000 if self._seen else 0.0
