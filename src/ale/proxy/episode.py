"""One agent's episode at the proxy: its key, what it may still use, and the record of what it was given.

with proxy.episode("g3/1", limits=Limits(max_requests=40)) as episode:
    ... an agent runs with OPENAI_BASE_URL=proxy.url and OPENAI_API_KEY=episode.key ...
trajectories = sequences(episode.tree, ...)
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter

import msgspec

from ale.messages import Sampling
from ale.proxy.dialogue import Refusal
from ale.proxy.journal import Journal
from ale.proxy.tree import TokenTree


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one episode may use. Whoever goes beyond gets 403 `episode_over` from then on, and `Episode.over` is set."""

    max_requests: int = 256
    max_tokens: int = 1_000_000
    """Sampled tokens of all requests together."""
    time_s: float = 3600.0
    max_turn_tokens: int = 4096
    """Sampled tokens of one answer: what a client gets at most, and what it gets when it names no number."""
    max_context_tokens: int = 32768
    """Prompt and answer together; a longer prompt is refused as providers do (`context_length_exceeded`)."""


class Usage(msgspec.Struct):
    requests: int = 0
    sampled: int = 0
    """Tokens that the engine sampled for this episode."""
    after_stop: int = 0
    """Of these, tokens behind a stop string: the client asked not to have them, and they are in no turn."""
    refused: int = 0
    abandoned: int = 0
    """Requests whose client went away before an answer; what was sampled until then is a turn, cut."""


class Episode:
    """Opened by the proxy. `key` is a secret that names this episode and opens nothing else."""

    def __init__(
        self,
        id: str,
        *,
        limits: Limits,
        sampling: Sampling,
        pinned: bool,
        tree: TokenTree | None,
        journal: Journal | None,
    ) -> None:
        """`pinned`: temperature, top-p and top-k are those of `sampling`, whatever a request says. What is trained on
        has to come from the distribution that the learner computes; other wishes are counted as `overridden`."""
        self.id = id
        self.key = f"ale-{secrets.token_urlsafe(24)}"
        self.limits = limits
        self.sampling = sampling
        self.pinned = pinned
        self.tree = tree
        self.journal = journal
        self.usage = Usage()
        self.counts: Counter[str] = Counter()
        self.busy_lanes: set[str] = set()
        self.lanes: set[str] = set()
        self.running: set[asyncio.Task[None]] = set()
        """The requests under way."""
        self.over = asyncio.Event()
        self.over_because: str | None = None
        self.failed: str | None = None
        """Why the engine failed a request, the last time that it did: such an episode must not be trained on."""
        self._reserved = 0
        self._ends = time.monotonic() + limits.time_s

    @property
    def time_left_s(self) -> float:
        return self._ends - time.monotonic()

    def end(self, because: str) -> None:
        """From now on every request is refused. The first cause stays."""
        if self.over_because is None:
            self.over_because = because
        self.over.set()

    def admit(self) -> None:
        """Counts a request. Raises `Refusal` when the episode is over."""
        if self.over_because is None:
            if self.usage.requests >= self.limits.max_requests:
                self.end(f"it has used its {self.limits.max_requests} requests")
            elif self.usage.sampled >= self.limits.max_tokens:
                self.end(f"it has used its {self.limits.max_tokens} tokens")
            elif self.time_left_s <= 0:
                self.end(f"it has used its {self.limits.time_s:g} s")
        if self.over_because is not None:
            raise self.refusal()
        self.usage.requests += 1

    def refusal(self) -> Refusal:
        return Refusal(403, f"the episode is over: {self.over_because}", kind="permission_error", code="episode_over")

    def reserve(self, wanted: int) -> int:
        """Sets up to `wanted` tokens aside for one answer; give them back with `settle`. Raises `Refusal` at 0."""
        room = self.limits.max_tokens - self.usage.sampled - self._reserved
        if room < 1:
            if not self._reserved:
                self.end(f"it has used its {self.limits.max_tokens} tokens")
                raise self.refusal()
            raise Refusal(429, "the rest of the episode's tokens is set aside for requests under way", code="budget")
        granted = min(wanted, room)
        self._reserved += granted
        return granted

    def settle(self, granted: int) -> None:
        self._reserved -= granted

    def take_lane(self, preferred: str | None) -> str:
        """A session of the policy for one answer: the one whose cache holds the prompt, unless it is in use."""
        if preferred is not None and preferred not in self.busy_lanes:
            lane = preferred
        else:
            lane = f"{self.id}~{len(self.lanes)}" if self.lanes else self.id
            self.lanes.add(lane)
        self.busy_lanes.add(lane)
        return lane
