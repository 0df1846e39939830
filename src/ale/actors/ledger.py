"""Where every rollout of a run is. At any time: started = trained + buffered + running + dropped, by identity.

A rollout is named by its id and moves one way, running -> buffered -> trained, or is dropped from either with a reason.
Any other move is a bug and raises: the books cannot be cooked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec


class LedgerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """`LedgerStatistics(started=64, running=8, buffered=16, trained=32, dropped={"zero_advantage": 8}, ...)`."""

    started: int
    running: int
    buffered: int
    trained: int
    dropped: dict[str, int]
    dropped_tokens: dict[str, float]
    """Mean action tokens of what was dropped, by reason: throwing away what is late throws away what is long."""

    @property
    def lost(self) -> int:
        return self.started - self.trained - self.buffered - self.running - sum(self.dropped.values())


class Ledger:
    def __init__(self) -> None:
        self._started = 0
        self._running: set[str] = set()
        self._buffered: set[str] = set()
        self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._dropped_tokens: Counter[str] = Counter()

    def start(self, rollout: str) -> None:
        if rollout in self._running or rollout in self._buffered:
            raise ValueError(f"rollout {rollout} was started already")
        self._started += 1
        self._running.add(rollout)

    def buffer(self, rollouts: Iterable[str]) -> None:
        for rollout in rollouts:
            self._running.remove(rollout)
            self._buffered.add(rollout)

    def train(self, rollouts: Iterable[str]) -> None:
        for rollout in rollouts:
            self._buffered.remove(rollout)
            self._trained += 1

    def drop(self, rollout: str, reason: str, tokens: int = 0) -> None:
        home = self._running if rollout in self._running else self._buffered
        home.remove(rollout)
        self._dropped[reason] += 1
        self._dropped_tokens[reason] += tokens

    def drop_running(self, reason: str) -> None:
        """The end of the run: what was still going on is dropped, not forgotten."""
        for rollout in list(self._running):
            self.drop(rollout, reason)

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics(
            started=self._started,
            running=len(self._running),
            buffered=len(self._buffered),
            trained=self._trained,
            dropped=dict(self._dropped),
            dropped_tokens={k: self._dropped_tokens[k] / n for k, n in self._dropped.items()},
        )
