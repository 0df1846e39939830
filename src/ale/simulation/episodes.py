"""How the episodes of a simulation go: drawn from a distribution, or as the journal of a run has them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Protocol

import msgspec

from ale.data.events import RolloutDropped, RolloutKept
from ale.data.journal import read_journal
from ale.errors import RunFolderError
from ale.messages import Status

_Z99 = 2.3263478740408408  # 0.99 quantile of the normal distribution
_FAILURES: tuple[Status, ...] = (
    "sandbox_failure",
    "policy_failure",
    "evaluator_error",
    "episode_timeout",
    "illegal_tool_calls",
    "agent_failure",
    "stopped_by_alarm",
)


class Episode(msgspec.Struct, frozen=True, kw_only=True):
    """`Episode(tools_s=3.2, tokens=96, turns=4, reward=1.0)`: what one rollout takes, apart from waiting for others."""

    tools_s: float
    """In the environment: commands, tests, and the start of its sandbox."""
    tokens: int
    turns: int = 1
    reward: float | None = 0.0
    status: Status = "scored"


class Sampler(Protocol):
    def draw(self, rng: random.Random) -> Episode: ...


class Lognormal(msgspec.Struct, frozen=True, kw_only=True):
    """`Lognormal(median_s=4, tail=20, crashes=0.02, solved=0.4, tokens=64, turns=3)`: `tail` is p99 over p50."""

    median_s: float = 4.0
    tail: float = 20.0
    crashes: float = 0.0
    solved: float = 0.5
    tokens: int = 64
    turns: int = 3

    def __post_init__(self) -> None:
        if not (self.median_s > 0 and self.tail >= 1 and self.tokens >= 1 and self.turns >= 1):
            raise ValueError("a lognormal latency needs a positive median, a tail of at least 1, tokens and turns")
        if not (0 <= self.crashes < 1 and 0 <= self.solved <= 1):
            raise ValueError("crashes and solved are shares: from 0 to 1, and not all crash")

    @property
    def mean_s(self) -> float:
        return self.median_s * math.exp(self._sigma**2 / 2)

    @property
    def _sigma(self) -> float:
        return math.log(self.tail) / _Z99

    def seconds(self, rng: random.Random) -> float:
        return self.median_s * math.exp(self._sigma * rng.gauss(0, 1))

    def draw(self, rng: random.Random) -> Episode:
        seconds = self.seconds(rng)
        if rng.random() < self.crashes:
            return Episode(tools_s=seconds * rng.random(), tokens=1, turns=1, reward=None, status="sandbox_failure")
        reward = float(rng.random() < self.solved)
        return Episode(tools_s=seconds, tokens=self.tokens, turns=self.turns, reward=reward)


class Recorded:
    """Draws whole episodes of a run, kept ones and failures in their shares. Their times are those at which they went
    in that run, its engine and its waits included: the simulated engine adds nothing."""

    def __init__(self, run: Path) -> None:
        """Reads the run's journal; the run may be live. Raises `RunFolderError`."""
        if not (run / "journal").is_file():
            raise RunFolderError(f"{run} holds no run to simulate: no journal in it.")
        self.episodes: list[Episode] = []
        self._failures: dict[Status, int] = {}
        for event in read_journal(run / "journal"):
            self._take(event)
        if not self.episodes:
            raise RunFolderError(f"{run} has kept no episode yet: there is nothing to draw from.")

    def _take(self, event: object) -> None:
        match event:
            case RolloutKept(trajectory=t):
                self.episodes.append(
                    Episode(
                        tools_s=t.duration_s,
                        tokens=max(1, t.action_tokens),
                        turns=max(1, len(t.chunks)),
                        reward=t.reward,
                    )
                )
            case RolloutDropped(reason=reason):
                for status in _FAILURES:
                    if reason == status:
                        self._failures[status] = self._failures.get(status, 0) + 1

    @property
    def failing(self) -> float:
        failed = sum(self._failures.values())
        return failed / (failed + len(self.episodes))

    def draw(self, rng: random.Random) -> Episode:
        episode = rng.choice(self.episodes)
        if rng.random() < self.failing:
            status = rng.choices(list(self._failures), list(self._failures.values()))[0]
            return msgspec.structs.replace(episode, reward=None, status=status)
        return episode
