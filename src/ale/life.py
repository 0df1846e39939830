"""The life of one actor: its start, its tasks, its crashes and restarts, its end.

    starting -> serving -> ending -> ended
       ^                     |
       +---- restarting <----+    after a crash, while the restart budget lasts

Every phase is bounded: `started` by the start deadline; finishing what is in the inbox, ending the tasks after their
cancellation, and `stopped` by the stop deadline each.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

import msgspec

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import ActorError, ActorStopped, RestartBudgetSpent
from ale.mailbox import OWNER
from ale.topic import M, Overflow, Publisher, Subscription
from ale.waiting import named
from ale.wire import Message
from ale.worker import Worker

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    """Restart a crashed actor: at most `budget` times within `window_s`, after `backoff_s`, doubled by each crash in
    the window up to `backoff_max_s`. `Restart(budget=3, window_s=60)`."""

    budget: int
    window_s: float
    backoff_s: float = 0.1
    backoff_max_s: float = 10.0


class Deadlines(msgspec.Struct, frozen=True):
    start_s: float
    stop_s: float


class Life:
    """Owns every task of one actor. Implements `ale.actor.Host`."""

    def __init__(
        self,
        actor: Actor,
        bus: Bus,
        restart: Restart | None,
        deadlines: Deadlines,
        on_failure: Callable[[Actor, BaseException], None],
    ) -> None:
        self.actor = actor
        self.bus = bus
        self.failure: BaseException | None = None
        self._restart = restart
        self._deadlines = deadlines
        self._on_failure = on_failure
        self._inbox = bus.register(actor.name, actor.capacity)
        self._loop = asyncio.get_running_loop()
        self._publishers: dict[type[Message], Publisher[Any]] = {}
        self._subscriptions: dict[type[Message], Subscription[Any]] = {}
        self._workers: dict[asyncio.Task[Any], Worker] = {}
        self._hands: list[Worker] = []
        self._main: asyncio.Task[Any] | None = None
        self._children: set[asyncio.Task[Any]] = set()
        self._crash: BaseException | None = None
        """The first error of this incarnation that nobody asked for."""
        self._crashes: deque[float] = deque()
        self._over = asyncio.Event()
        self._winding_down = False
        self.begun = asyncio.Event()
        """Set when the first `started` has returned, or the actor has ended without it."""
        self.ended = asyncio.Event()
        """Set when every task of the actor has ended and nobody waits for it any more."""
        actor.host = self
        self._task = self._loop.create_task(self._live(), name=f"{actor.name}/life", context=self._owned())
        # A callback, because a task that is cancelled before its first step runs no `finally`.
        self._task.add_done_callback(self._end)

    def stop(self) -> None:
        """Asks the actor to finish what is in its inbox and to end. `ended` is set within the stop deadlines."""
        if self._winding_down:
            return
        if self._inbox.state == "serving":
            self._wind_down()
            return
        self._winding_down = True
        self._inbox.close()
        if self._inbox.state in ("starting", "restarting"):
            self._task.cancel()

    def on_end(self, call: Callable[[], None]) -> None:
        """Calls `call` when the actor has ended."""
        self._task.add_done_callback(lambda _: call())

    # Host

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        return self._own(work, f"{self.actor.name}/{name}")

    def publisher(self, type_: type[M]) -> Publisher[M]:
        if type_ not in self._publishers:
            self._publishers[type_] = self.bus.publisher(type_)
        return self._publishers[type_]

    def subscribe(self, type_: type[M], capacity: int, overflow: Overflow) -> Subscription[M]:
        if type_ not in self._subscriptions:
            self._subscriptions[type_] = self.bus.subscribe(
                type_, self.actor.name, capacity=capacity, overflow=overflow
            )
        return self._subscriptions[type_]

    # Phases

    async def _live(self) -> None:
        while True:
            try:
                await self._incarnation()
                return
            except Exception as error:
                delay_s = self._backoff_s(error)
            self._inbox.state = "restarting"
            async with self.bus.waiting(f"the end of the back-off of {self._inbox.owner}"):
                await asyncio.sleep(delay_s)
            self._inbox.restarts += 1
            self._inbox.state = "starting"

    async def _incarnation(self) -> None:
        """From `started` to `stopped`; raises what crashed the actor."""
        self._over.clear()
        self._crash = None
        owner = self._inbox.owner
        try:
            async with self.bus.waiting(f"the start of {owner}", deadline_s=self._deadlines.start_s):
                await self.actor.started()
            try:
                self._serve()
                with named(f"the work of {owner}", idle=True):
                    await self._over.wait()
            finally:
                self._inbox.state = "ending"
                await self._end_children()
                async with self.bus.waiting(f"the end of {owner}", deadline_s=self._deadlines.stop_s):
                    await self.actor.stopped()
        except Exception as error:
            self._crashed(error)
        finally:
            await self._end_children()  # what `started` spawned before it raised, or `stopped`
        if self._crash is not None:
            raise self._crash

    def _serve(self) -> None:
        self._inbox.state = "serving"
        actor = self.actor
        for number in range(actor.concurrency):
            name = actor.name if actor.concurrency == 1 else f"{actor.name}/{number}"
            worker = Worker(actor, self._inbox, name)
            self._workers[self._own(worker.serve(), name)] = worker
        self._hands = list(self._workers.values())
        self._inbox.hands = self._hands
        if type(actor).run is not Actor.run:
            self._main = self._own(actor.run(), f"{actor.name}/run")
        self.begun.set()

    def _wind_down(self) -> None:
        """No new messages, no own loop; the workers handle what is there and then the actor is over."""
        if self._winding_down:
            return
        self._winding_down = True
        self._inbox.close()
        if self._main is not None:
            self._main.cancel()
        timer = self._loop.call_later(self._deadlines.stop_s, self._cut_short)
        self.on_end(timer.cancel)

    def _cut_short(self) -> None:
        if self._over.is_set():
            return
        in_hand = [type(hand.current.message).__name__ for hand in self._hands if hand.current is not None]
        logger.warning(
            "%s did not finish within %g s of its stop and was cancelled; in hand: %s; in its inbox: %d",
            self._inbox.owner,
            self._deadlines.stop_s,
            ", ".join(in_hand) or "nothing",
            len(self._inbox.items),
        )
        self._over.set()

    def _backoff_s(self, error: Exception) -> float:
        """How long to wait before the restart; raises when there is to be none."""
        restart = self._restart
        # A task that outlived its cancellation must not meet its successor.
        if restart is None or self._winding_down or self._children:
            raise error
        now = self._loop.time()
        while self._crashes and self._crashes[0] <= now - restart.window_s:
            self._crashes.popleft()
        if len(self._crashes) >= restart.budget:
            raise RestartBudgetSpent(
                f"{self._inbox.owner} crashed again after {restart.budget} restarts within {restart.window_s:g} s"
            ) from error
        delay_s = min(restart.backoff_s * 2.0 ** len(self._crashes), restart.backoff_max_s)
        self._crashes.append(now)
        logger.warning("%s crashed; it restarts in %g s", self._inbox.owner, delay_s, exc_info=error)
        return delay_s

    def _end(self, task: asyncio.Task[None]) -> None:
        """The last thing that happens: nobody waits for the dead."""
        if not task.cancelled():
            self.failure = task.exception()
        elif not self._winding_down:
            self.failure = ActorError(f"the task of {self._inbox.owner} was cancelled behind its supervisor's back")
        self._inbox.state = "ended"
        self._inbox.end("stopped" if self.failure is None else "crashed", self.failure)
        for publisher in self._publishers.values():
            publisher.close()
        for subscription in self._subscriptions.values():
            subscription.close()
        if self.failure is not None:
            self._on_failure(self.actor, self.failure)
        self.begun.set()
        self.ended.set()

    # Tasks

    def _own(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = self._loop.create_task(work, name=name, context=self._owned())
        self._children.add(task)
        task.add_done_callback(self._child_ended)
        return task

    def _owned(self) -> Context:
        context = copy_context()
        context.run(OWNER.set, self.actor.name)
        return context

    def _child_ended(self, task: asyncio.Task[Any]) -> None:
        self._children.discard(task)
        is_worker = self._workers.pop(task, None) is not None
        if task.cancelled():
            if (is_worker or task is self._main) and not self._over.is_set() and not self._winding_down:
                self._crashed(ActorError(f"task {task.get_name()!r} was cancelled behind its supervisor's back"))
        elif (error := task.exception()) is not None:
            self._crashed(error)
        elif task is self._main:
            self._wind_down()
        if self._winding_down and not self._workers:
            self._over.set()

    def _crashed(self, error: BaseException) -> None:
        if self._crash is None:
            self._crash = error
        else:
            logger.warning("%s, already crashed, also failed with", self._inbox.owner, exc_info=error)
        self._over.set()

    async def _end_children(self) -> None:
        """Cancels every task of the actor and waits for each; what they had in hand is accounted for."""
        for hand in self._hands:
            hand.dismissed = True
        try:
            if self._children:
                names = ", ".join(sorted(repr(task.get_name()) for task in self._children))
                what = f"the end of the cancelled tasks {names}"
                async with self.bus.waiting(what, deadline_s=self._deadlines.stop_s):
                    while self._children:
                        for task in self._children:
                            task.cancel()
                        await asyncio.wait(self._children)
        finally:
            self._release_hands()

    def _release_hands(self) -> None:
        reason = "stopped" if self._crash is None else "crashed"
        for hand in self._hands:
            envelope, hand.current = hand.current, None
            if envelope is not None:
                doing = f"{self._inbox.owner} {reason} while it had {type(envelope.message).__name__} in hand"
                error = ActorStopped(doing) if self._crash is None else ActorError(doing)
                error.__cause__ = self._crash
                self._inbox.drop(envelope, reason, error)
        self._hands, self._inbox.hands = [], []
        self._workers.clear()
        self._main = None
