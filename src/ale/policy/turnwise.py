"""A policy whose turns are of one version each (`rollout.versions = "turn"`).

New weights wait for the turns that are being generated, up to `drain_s`; meanwhile none begins. A turn that lasts
longer is abandoned and generated again, from its first token, under the new weights. Nobody had been given anything of
it, so nothing that is on record is lost; `restarted` counts how often it happened.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from ale.errors import DeadlineExceeded, PolicyError, first_error
from ale.messages import EngineStatistics, Generate, Turn
from ale.policy.port import OpenPolicy
from ale.waiting import named

logger = logging.getLogger(__name__)

_ABANDON_DEADLINE_S = 60.0


class TurnwisePolicy:
    def __init__(self, policy: OpenPolicy, *, drain_s: float) -> None:
        self._policy = policy
        self._drain_s = drain_s
        self._turns: Counter[str] = Counter()  # under way, by session
        self._abandoned: set[str] = set()
        self._begin = asyncio.Event()
        self._begin.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.restarted = 0
        """Turns that were generated again."""

    @property
    def version(self) -> int:
        return self._policy.version

    async def statistics(self) -> EngineStatistics:
        return await self._policy.statistics()

    def counters(self) -> dict[str, float]:
        return self._policy.counters() | {"turns_restarted": float(self.restarted)}

    async def generate(self, request: Generate) -> Turn:
        session = request.session
        while True:
            while not self._begin.is_set():
                with named("new weights, which come between two turns", on="actor trainer"):
                    await self._begin.wait()  # `load_weights` opens it again, whatever becomes of it
            self._turns[session] += 1
            self._idle.clear()
            try:
                turn = await self._policy.generate(request)
            except PolicyError:
                if session not in self._abandoned:
                    raise
                self.restarted += 1
                continue
            finally:
                self._ended(session)
            versions = set(turn.version_A.numpy().tolist())
            if len(versions) > 1:
                raise PolicyError(f"a turn of {session} has tokens of the versions {sorted(versions)}, not of one")
            return turn

    async def end_session(self, session: str) -> None:
        await self._policy.end_session(session)

    async def load_weights(self, version: int, slot: int) -> None:
        """Raises `DeadlineExceeded` when a turn does not end although it was abandoned."""
        self._begin.clear()
        try:
            if not await self._drained(self._drain_s):
                await self._abandon()
            await self._policy.load_weights(version, slot)
        finally:
            self._abandoned.clear()
            self._begin.set()

    async def _abandon(self) -> None:
        self._abandoned = set(self._turns)
        logger.info("%d turns last longer than %g s and begin again", len(self._abandoned), self._drain_s)
        try:
            async with asyncio.TaskGroup() as group:
                for session in self._abandoned:
                    group.create_task(self._policy.end_session(session), name=f"abandon the turn of {session}")
        except ExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        if not await self._drained(_ABANDON_DEADLINE_S):
            raise DeadlineExceeded(f"new weights wait for the turns of {', '.join(self._turns)}", _ABANDON_DEADLINE_S)

    async def _drained(self, deadline_s: float) -> bool:
        try:
            what = f"the end of the turns of {len(self._turns)} sessions"
            with named(what, on="actor envs", deadline_s=deadline_s):
                async with asyncio.timeout(deadline_s):
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _ended(self, session: str) -> None:
        self._turns[session] -= 1
        if not self._turns[session]:
            del self._turns[session]
        if not self._turns:
            self._idle.set()
