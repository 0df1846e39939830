"""The watchdog: writes down every second what the run waits for, and ends a run in which nothing is finished any more.

Silence is counted in beats, never longer than two of them each: while the machine sleeps or the process is stopped no
time passes for it. A clock that jumps is noted, since deadlines pass by it all at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from ale.actor import Actor
from ale.bus import Bus
from ale.data.cause import find, report, span
from ale.data.moment import BEAT_S, Moment
from ale.errors import Stalled
from ale.progress import Progress
from ale.unnamed import stack_of
from ale.vitals import look
from ale.waiting import named, register

logger = logging.getLogger(__name__)

# A beat that comes this late: the process was stopped, or the machine slept, or the event loop was held up.
_LATE_S = 5.0
# A wall clock that went this far astray between two beats was set.
_ASTRAY_S = 2.0
_NOTES = 5
# So long after it, a note is no explanation any more.
_NOTED_S = 900.0

Keep = Callable[[Moment], None]


class Watchdog(Actor):
    """`keep` puts the moment away and may raise `OSError`. `silence_s` 0: it only writes down."""

    def __init__(
        self,
        silence_s: float,
        keep: Keep,
        last: Callable[[], Progress | None] = lambda: None,
        *,
        stuck: Callable[[str], None] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`stuck` ends the process: it is called from another thread when the event loop itself stands still for
        `silence_s`, and nothing in it can be told to end any more."""
        super().__init__("watchdog", capacity=1)
        self._silence_s = silence_s
        self._keep = keep
        self._last = last
        self._stuck = stuck
        self._wall = wall
        self._latest = Moment(at=wall(), pid=os.getpid(), vitals=look(os.getpid()))
        self._frozen = False
        self._beat_at = 0.0, wall()
        self._silent_s = 0.0
        self._notes: deque[tuple[float, str]] = deque(maxlen=_NOTES)
        self._disk = ""
        self._turns = 0
        """Beats of the event loop, for the thread that watches it."""
        self._over = threading.Event()

    async def started(self) -> None:
        self._silent_s = 0.0
        self._over.clear()
        guard = threading.Thread(
            target=self._guard, args=(threading.get_ident(),), name="watchdog of the event loop", daemon=True
        )
        guard.start()

    async def run(self) -> None:
        loop, seen = asyncio.get_running_loop(), register()
        mark = seen.progress_at
        self._beat_at = loop.time(), self._wall()
        while True:
            with named("the next beat", idle=True):
                await asyncio.sleep(BEAT_S)
            self._silent_s += min(max(self._passed(), 0.0), 2 * BEAT_S)
            self._turns += 1
            if seen.progress_at != mark or seen.holds:
                mark, self._silent_s = seen.progress_at, 0.0
            moment = self.moment(self.bus)
            self._write(moment)
            if 0 < self._silence_s <= self._silent_s:
                cause = find(moment)
                said = f"{cause.said}. Released by: {cause.release}" if cause else "nothing waits for anything"
                silent = f"Nothing was finished for {span(self._silent_s)} (watchdog.silence_s)"
                raise Stalled(f"{silent}. Why: {said}.", report(moment))

    async def stopped(self) -> None:
        self._over.set()

    def moment(self, bus: Bus) -> Moment:
        seen, last, now = register(), self._last(), asyncio.get_running_loop().time()
        notes = [note for at, note in self._notes if now - at < _NOTED_S]
        return Moment(
            at=self._wall(),
            pid=os.getpid(),
            vitals=look(os.getpid()),
            phase=last.phase if last is not None else "",
            step=last.step if last is not None else 0,
            total=last.total if last is not None else 0,
            silent_s=self._silent_s,
            progress=seen.progress,
            failures=dict(seen.failures),
            waits=tuple(bus.waits(everything=True)),
            processes=tuple(state() for state in seen.processes.values()),
            notes=(*notes, self._disk) if self._disk else tuple(notes),
            counters=dict(seen.counters),
        )

    def freeze(self, error: BaseException) -> None:
        """The run ends because of `error`: what was waited for just before stays on record, and not what its end
        waits for."""
        if not self._frozen:
            self._frozen = True
            with suppress(RuntimeError):  # by an error outside of the loop
                self._passed()
            notes = tuple(note for _, note in self._notes)
            ended = f"{type(error).__name__}: {error}"
            self._keep_quietly(msgspec.structs.replace(self._latest, ended=ended, notes=notes))

    def _write(self, moment: Moment) -> None:
        self._latest = moment
        if not self._frozen:
            self._keep_quietly(moment)

    def _keep_quietly(self, moment: Moment) -> None:
        try:
            self._keep(moment)
            self._disk = ""
        except OSError as error:  # the run may go on without it; what the journal cannot write ends the run
            if not self._disk:
                logger.warning("the moment of the run cannot be written: %s", error)
            self._disk = f"its folder cannot be written: {error}"

    def _passed(self) -> float:
        """The time since the last call; what is odd about it is noted."""
        (then, wall_then), now, wall = self._beat_at, asyncio.get_running_loop().time(), self._wall()
        self._beat_at = now, wall
        self._note_jumps(now, now - then, wall - wall_then)
        return now - then

    def _note_jumps(self, now: float, took_s: float, wall_s: float) -> None:
        if took_s > _LATE_S:
            self._notes.append(
                (
                    now,
                    f"the clock jumped by {span(took_s)} between two beats of a second, by which every deadline has "
                    "moved: the process was stopped, the machine slept, or the event loop was held up",
                )
            )
        elif took_s < 0:
            self._notes.append((now, f"the event loop's clock went back by {span(-took_s)}: its timers are that late"))
        astray_s = wall_s - took_s
        if abs(astray_s) > _ASTRAY_S:
            way = "forward" if astray_s > 0 else "back"
            self._notes.append((now, f"the wall clock was set {way} by {span(abs(astray_s))}; no deadline goes by it"))

    def _guard(self, thread: int) -> None:
        """In a thread of its own: says where the event loop is, when it does not turn any more. Counted in looks, as
        silence is: after a stop of the whole process this thread may be the first to go on."""
        told, turns, held_s, looked_at = False, self._turns, 0.0, time.monotonic()
        while not self._over.wait(BEAT_S):
            now = time.monotonic()
            passed_s, looked_at = min(now - looked_at, 2 * BEAT_S), now
            held_s = held_s + passed_s if turns == self._turns else 0.0
            turns = self._turns
            if held_s < _LATE_S:
                told = False
                continue
            place = stack_of(thread)
            note = f"the event loop of the controller has not turned for {span(held_s)}: it is in {place}"
            if not told:
                logger.warning("%s", note)
                told = True
            moment = msgspec.structs.replace(
                self._latest, at=self._wall(), vitals=look(os.getpid()), held_s=held_s, notes=(note,)
            )
            self._write(moment)
            if self._stuck is not None and 0 < self._silence_s <= held_s:
                self._stuck(f"{note}.\n{report(moment)}")
