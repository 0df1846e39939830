"""The supervisor owns actors: it starts them in order, watches them, and stops them in reverse order.

    async with Supervisor(bus) as supervisor:
        await supervisor.start(SampleBuffer(...))
        await supervisor.start(Generator(...), restart=Restart(budget=3, window_s=60))
        await supervisor.start(trainer)
        await supervisor.join(trainer)

An actor that crashes for good cancels the body of the `async with`; the others are stopped in order, and the first
such error is raised at the end, as it was, with a note that names the actor.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine
from math import inf
from types import TracebackType
from typing import Any

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import ActorError
from ale.life import Deadlines, Life, Restart

logger = logging.getLogger(__name__)


class Supervisor:
    """`start_deadline_s` bounds each actor's `started`; `stop_deadline_s` bounds, for each actor in turn, finishing
    its inbox, then ending its cancelled tasks, then `stopped`. May be nested: a body or an actor's `run` can hold
    another supervisor."""

    def __init__(
        self,
        bus: Bus,
        *,
        start_deadline_s: float = 60.0,
        stop_deadline_s: float = 10.0,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`on_failure` hears of the first failure before anything is stopped because of it."""
        self._bus = bus
        self._deadlines = Deadlines(start_deadline_s, stop_deadline_s)
        self._lives: dict[Actor, Life] = {}
        self._on_failure = on_failure
        self._failure: BaseException | None = None
        self._body: asyncio.Task[Any] | None = None
        self._body_cancelled = False
        self._cancelling = 0
        self._stopping = False

    async def start(self, actor: Actor, *, restart: Restart | None = None) -> None:
        """Returns when the actor's `started` has. With `restart` None a crash stops everything."""
        life = self._begin(actor, restart)
        async with self._bus.waiting(f"the start of actor {actor.name!r}", on=f"actor {actor.name}"):
            await life.begun.wait()
        if life.failure is not None:
            raise ActorError(f"actor {actor.name!r} did not start") from life.failure

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> Actor:
        """Owns `work` like an actor that only runs: its error stops everything, leaving the body cancels it."""
        actor = _Spawned(name, work)
        try:
            life = self._begin(actor, None)
        except BaseException:
            work.close()
            raise
        life.on_end(actor.close)
        return actor

    async def stop(self, actor: Actor) -> None:
        """Ends one actor: it handles what is in its inbox, within the stop deadline."""
        life = self._life(actor)
        life.stop()
        async with self._bus.waiting(f"the end of actor {actor.name!r}", on=f"actor {actor.name}"):
            await life.ended.wait()

    async def join(self, actor: Actor, *, deadline_s: float = inf) -> None:
        """Waits until the actor has ended: its `run` returned and its inbox is empty.

        Raises `ActorError`, with its cause, when it crashed, and `DeadlineExceeded`.
        """
        life = self._life(actor)
        on = f"actor {actor.name}"
        async with self._bus.waiting(f"the end of actor {actor.name!r}", on=on, deadline_s=deadline_s):
            await life.ended.wait()
        if life.failure is not None:
            raise ActorError(f"actor {actor.name!r} crashed") from life.failure

    async def __aenter__(self) -> Supervisor:
        if self._body is not None:
            raise ActorError("a supervisor is entered once: make a new one")
        self._body = asyncio.current_task()
        self._cancelling = self._body.cancelling() if self._body is not None else 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._failure is None and error is not None and not isinstance(error, asyncio.CancelledError):
            self._failure = error  # the body failed first: what follows from that must not hide it
            self._on_failure(error)
        cancelled = await self._stop_all() or isinstance(error, asyncio.CancelledError)
        if self._body_cancelled and self._body is not None:
            cancelled = self._body.uncancel() > self._cancelling  # was anybody but us at it?
        if cancelled:
            if self._failure is not None and self._failure is not error:
                logger.warning("cancelled from outside after a failure", exc_info=self._failure)
            if not isinstance(error, asyncio.CancelledError):
                raise asyncio.CancelledError
        elif self._failure is not None and self._failure is not error:
            raise self._failure from self._failure.__cause__

    async def _stop_all(self) -> bool:
        """Stops every actor, last started first. A cancellation meanwhile does not cut it short; returns whether
        there was one. It ends all the same: every phase of an actor's end has a deadline."""
        self._stopping = True
        cancelled = False
        for life in reversed(self._lives.values()):
            life.stop()
            while not life.ended.is_set():
                try:
                    async with self._bus.waiting(
                        f"the end of actor {life.actor.name!r}", on=f"actor {life.actor.name}"
                    ):
                        await life.ended.wait()
                except asyncio.CancelledError:
                    cancelled = True
        return cancelled

    def _begin(self, actor: Actor, restart: Restart | None) -> Life:
        if self._body is None:
            raise ActorError("enter the supervisor first: `async with Supervisor(bus) as supervisor:`")
        if self._stopping:
            raise ActorError(f"the supervisor is stopping and cannot start actor {actor.name!r}")
        if actor in self._lives:
            raise ActorError(f"actor {actor.name!r} was started already: make a new one")
        life = self._lives[actor] = Life(actor, self._bus, restart, self._deadlines, self._failed)
        return life

    def _life(self, actor: Actor) -> Life:
        if actor not in self._lives:
            raise ActorError(f"actor {actor.name!r} was not started by this supervisor")
        return self._lives[actor]

    def _failed(self, actor: Actor, error: BaseException) -> None:
        error.add_note(f"in actor {actor.name!r}")
        if self._failure is not None:
            logger.warning("actor %r also failed, after the first cause", actor.name, exc_info=error)
            return
        self._failure = error
        self._on_failure(error)
        if not self._stopping and self._body is not None:
            self._body_cancelled = True
            self._body.cancel()


class _Spawned(Actor):
    def __init__(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        super().__init__(name, capacity=1)
        self._work = work

    async def run(self) -> None:
        await self._work

    def close(self) -> None:
        if inspect.getcoroutinestate(self._work) == inspect.CORO_CREATED:
            self._work.close()  # stopped before its first step
