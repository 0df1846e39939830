"""How busy each component was, and what it used, between two updates."""

from __future__ import annotations

import os
import time

from ale.vitals import look
from ale.waiting import register


class Load:
    """A component's `busy` is the share of time in which it had a request; its `bubble` is the rest."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._busy: dict[str, tuple[int, float]] = {}

    def since_last(self) -> dict[str, float]:
        """`{"engine_busy": 0.93, "engine_bubble": 0.07, "engine_memory_mb": 812.0, "engine_descriptors": 14.0, ...}`"""
        now = time.monotonic()
        passed_s, self._at = max(now - self._at, 1e-9), now
        mine = look(os.getpid())
        values = {
            "controller_memory_mb": mine.memory_mb,
            "controller_descriptors": float(mine.descriptors),
            "controller_cpu_s": mine.cpu_s,
        }
        for name, state in register().processes.items():
            seen = state()
            values[f"{name}_memory_mb"] = seen.vitals.memory_mb
            values[f"{name}_descriptors"] = float(seen.vitals.descriptors)
            values[f"{name}_cpu_s"] = seen.vitals.cpu_s
            if seen.beat_s is None and not seen.busy_s:
                continue  # it does nothing on request
            pid, before_s = self._busy.get(name, (seen.pid, 0.0))
            # One that was started again counts from 0.
            spent_s = seen.busy_s - (before_s if pid == seen.pid else 0.0)
            self._busy[name] = (seen.pid, seen.busy_s)
            busy = min(1.0, spent_s / passed_s)
            values |= {f"{name}_busy": busy, f"{name}_bubble": 1.0 - busy}
        return values
