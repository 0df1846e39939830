"""A worker process that is started again in its place when it dies, or when it has to be killed for its silence.

What it was asked and had not answered is asked of its successor: the requests must be such that this gives the same,
or be about what the dead one alone knew.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType

from ale.errors import RestartBudgetSpent, WorkerDied
from ale.heart import BEAT_S
from ale.process import WorkerProcess
from ale.vitals import ProcessState
from ale.waiting import named, register
from ale.wire import Reply, Request

logger = logging.getLogger(__name__)

_WINDOW_S = 3600.0


class KeptWorker:
    """`make` makes a worker that is not entered yet, `bring_up` asks it whatever opens it and leads it to where its
    predecessor was. Use it with `async with`, and let somebody own `watch`."""

    def __init__(
        self,
        make: Callable[[], WorkerProcess],
        bring_up: Callable[[WorkerProcess], Awaitable[None]],
        *,
        restarts: int,
        heartbeat_s: float = 0.0,
    ) -> None:
        self._make = make
        self._bring_up = bring_up
        self._restarts = restarts
        self._heartbeat_s = heartbeat_s
        self._worker: WorkerProcess | None = None
        self._restarted: deque[float] = deque()
        self._restarting: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._silent = 0
        """How many were killed for their silence."""

    async def __aenter__(self) -> KeptWorker:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._closed = True
        if self._restarting is not None:
            self._restarting.cancel()
            with named("the end of a restart that was cancelled"):  # which closes its process within its deadlines
                await asyncio.wait({self._restarting})
        await self._close()

    @property
    def worker(self) -> WorkerProcess:
        """The process there is now. Raises `WorkerDied` between two."""
        if self._worker is None:
            raise WorkerDied("the worker was not started again") from self._failure
        return self._worker

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        """Like `WorkerProcess.ask`, of a successor again where the worker dies. `deadline_s` is each one's."""
        while True:
            if self._restarting is not None:
                await asyncio.shield(self._restarting)
            worker = self.worker
            try:
                return await worker.ask(request, deadline_s=deadline_s)
            except WorkerDied as error:
                await self._replace(worker, error)
                register().counters[f"{worker.name}_requests_asked_again"] += 1

    async def watch(self) -> None:
        """Kills the worker when it is silent, or at one step, for too long. Raises `RestartBudgetSpent` when it was
        given up."""
        silent_s, last, loop = 0.0, "", asyncio.get_running_loop()
        looked_at = loop.time()
        while True:
            with named("its next look at the worker", idle=True):
                await asyncio.sleep(BEAT_S)
            if self._failure is not None:
                raise self._failure
            now = loop.time()
            # While the machine sleeps, no time passes.
            passed_s, looked_at = min(now - looked_at, 2 * BEAT_S), now
            if self._restarting is not None or self._worker is None or not self._heartbeat_s:
                silent_s = 0.0
                continue
            state = self._worker.state()
            moved = _moved(state)
            silent_s = 0.0 if moved != last or not state.asked else silent_s + passed_s
            last = moved
            if silent_s > self._heartbeat_s:
                silent_s = 0.0
                logger.warning("%s has not moved for %g s and is killed: %s", state.name, self._heartbeat_s, state)
                self._silent += 1
                self._worker.kill()

    async def _replace(self, worker: WorkerProcess, error: WorkerDied) -> None:
        """Returns when there is another worker than this one, which has died. Raises `WorkerDied`, or what kept the
        next from starting."""
        if self._closed or self._failure is not None:
            raise error
        if self._worker is worker and self._restarting is None:
            try:
                self._spend(worker.name, error)
            except RestartBudgetSpent as spent:
                self._failure = spent
                raise error from None
            self._restarting = asyncio.create_task(self._restart(worker.name), name=f"the restart of {worker.name}")
            self._restarting.add_done_callback(_seen)
        if self._restarting is not None:
            with named(f"the restart of process {worker.name}", on=f"process {worker.name}"):
                await asyncio.shield(self._restarting)

    def _spend(self, name: str, error: WorkerDied) -> None:
        """One of the restarts that there are. Raises `RestartBudgetSpent`."""
        now = asyncio.get_running_loop().time()
        while self._restarted and self._restarted[0] <= now - _WINDOW_S:
            self._restarted.popleft()
        if len(self._restarted) >= self._restarts:
            said = f"process {name} died, after {self._restarts} restarts within an hour (watchdog.restarts)"
            if self._silent:
                said += (
                    f"; {self._silent} times it was killed, for it had finished no step in {self._heartbeat_s:g} s: a "
                    "large model may need more (watchdog.heartbeat_s, policy.turn_deadline_s)"
                )
            raise RestartBudgetSpent(said) from error
        self._restarted.append(now)
        logger.warning("process %s died and is started again: %s", name, error)

    async def _restart(self, name: str) -> None:
        try:
            await self._close()
            while True:
                try:
                    await self._open()
                    break
                except WorkerDied as error:  # on its way up: that is a death like any other
                    self._spend(name, error)
            register().counters[f"{name}_restarts"] += 1
        except Exception as error:
            self._failure = error
            raise WorkerDied(f"process {name} could not be started again: {error}") from error
        finally:
            self._restarting = None

    async def _open(self) -> None:
        worker = self._make()
        await worker.__aenter__()
        self._worker = worker
        try:
            await self._bring_up(worker)
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.__aexit__(None, None, None)


def _seen(task: asyncio.Task[None]) -> None:
    """Everybody who waited for it may have gone; `watch` tells what went wrong."""
    if not task.cancelled():
        task.exception()


def _moved(state: ProcessState) -> str:
    """Changes whenever the worker finishes a step; a request that it has not even taken is no step."""
    return f"{state.pid} {state.steps} {state.asked == 0}"
