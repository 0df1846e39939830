"""The episodes under way: how many there may be at once, and how far each of them is. State to read, not a queue.

The environment manager enters every episode here and waits for its place, the policy is listened to on the way, the
generator reads what a cancelled episode had sampled, and the concurrency controller moves `limit`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ale.messages import Generate, Turn
from ale.policy.port import Policy


@dataclass(slots=True)
class Episode:
    first_version: int | None = None
    """The oldest version that a token of it can have; None before it asked for one."""
    tokens: int = 0
    """Sampled in the turns that are over."""


class Episodes:
    """Places are given in the order in which they were asked for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: dict[str, Episode] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._promised = 0
        """Places that were given to somebody who has not woken up yet."""

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        """A lower limit ends nothing: no episode begins until enough have ended."""
        self._limit = max(1, value)
        self._give()

    @property
    def running(self) -> int:
        return len(self._under_way)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def sampled(self, rollout: str) -> int:
        """Tokens of its turns so far; 0 where it has not begun."""
        episode = self._under_way.get(rollout)
        return episode.tokens if episode is not None else 0

    def first_version(self, rollout: str) -> int | None:
        """The oldest version that a token of it can have; None where it has asked for none yet."""
        episode = self._under_way.get(rollout)
        return episode.first_version if episode is not None else None

    @asynccontextmanager
    async def place(self, rollout: str) -> AsyncIterator[None]:
        """Held from before an episode's environment starts until it has closed."""
        if self._waiting or self.running + self._promised >= self._limit:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():  # given in the very moment of the cancellation
                    self._promised -= 1
                elif mine in self._waiting:  # else it was passed over already
                    self._waiting.remove(mine)
                self._give()
                raise
            self._promised -= 1
        self._under_way[rollout] = Episode()
        try:
            yield
        finally:
            del self._under_way[rollout]
            self._give()

    def asked(self, rollout: str, version: int) -> None:
        """A turn begins under this version."""
        episode = self._under_way.get(rollout)
        if episode is not None and episode.first_version is None:
            episode.first_version = version

    def heard(self, rollout: str, tokens: int, oldest: int) -> None:
        """A turn is over; `oldest` is the oldest version of any of its tokens."""
        episode = self._under_way.get(rollout)
        if episode is not None:
            if not episode.tokens:
                episode.first_version = oldest  # it may have waited through a change of weights
            episode.tokens += tokens

    def _give(self) -> None:
        while self._waiting and self.running + self._promised < self._limit:
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(None)
                self._promised += 1


class HeardPolicy:
    """A `Policy` that tells `episodes` of every turn. What it does not know it passes on."""

    def __init__(self, policy: Policy, episodes: Episodes) -> None:
        self._policy = policy
        self._episodes = episodes

    @property
    def version(self) -> int:
        return self._policy.version

    async def generate(self, request: Generate) -> Turn:
        rollout = request.session.partition("~")[0]  # an agent that branches has several sessions
        self._episodes.asked(rollout, self._policy.version)
        turn = await self._policy.generate(request)
        self._episodes.heard(rollout, len(turn.tokens_A), int(turn.version_A.numpy().min()))
        return turn

    async def end_session(self, session: str) -> None:
        await self._policy.end_session(session)

    async def load_weights(self, version: int, slot: int) -> None:
        await self._policy.load_weights(version, slot)
