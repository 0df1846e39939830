"""The heart of a worker process: a thread that says every second what the process does, whatever that is.

A process that is stopped, or whose every thread is stuck, sends nothing; one whose work is stuck beats on and says
since when, and in what. The parent keeps the last beat (`WorkerProcess.state`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import msgspec

BEAT_S = 1.0


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """`Beat(doing="TrainStep", doing_s=3.2, step_s=3.2, steps=81, in_hand=1)`: `in_hand` requests were taken and not
    answered; `steps` pieces of work were finished, the last `step_s` ago."""

    doing: str
    doing_s: float
    step_s: float
    steps: int
    in_hand: int


class Heart:
    """`with Heart(send) as heart`, around the main loop. Its methods belong to the main thread."""

    def __init__(self, send: Callable[[Beat], None]) -> None:
        self._send = send
        self._in_hand = self._steps = 0
        self._doing = ("", time.monotonic())  # one object, so that the thread sees both or neither
        self._stepped_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(BEAT_S)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        self._doing = (what, time.monotonic())
        try:
            yield
        finally:
            self._stepped_at = time.monotonic()
            self._doing = ("", self._stepped_at)
            self._steps += 1

    def moved(self) -> None:
        """A part of what is being done is finished, and the next begins."""
        self._stepped_at = time.monotonic()
        self._doing = (self._doing[0], self._stepped_at)
        self._steps += 1

    def took(self) -> None:
        self._in_hand += 1

    def gave(self) -> None:
        self._in_hand -= 1

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            what, since = self._doing
            now = time.monotonic()
            beat = Beat(
                doing=what,
                doing_s=now - since if what else 0.0,
                step_s=now - self._stepped_at,
                steps=self._steps,
                in_hand=self._in_hand,
            )
            try:
                self._send(beat)
            except OSError:  # the parent has gone; the main thread sees it too
                return
