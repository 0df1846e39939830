"""The timeline of a run: what each actor waited for and when, and what its processes used, as a Chrome trace.

`timeline.json` in the run's folder opens in https://ui.perfetto.dev and in chrome://tracing: the array form of the
format, whose closing bracket may be missing. Rows are tasks (`envs/3`, `trainer/run`, `group g7`) and the processes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson

from ale.data.moment import Moment
from ale.mailbox import Waiter

_SHORTEST_S = 0.001


class Timeline:
    """At most `max_mb` of it, over all lives of the run: then it ends, and says so. Events are kept until `flush`."""

    def __init__(self, path: Path, max_mb: int, life: int = 1) -> None:
        """Rows are counted anew in each `life` of the run: the viewer shows it as a process of its own."""
        self._path = path
        self._max_bytes = max_mb * 2**20
        self._tracks: dict[str, int] = {}
        self._lines: list[bytes] = []
        self._full = max_mb == 0
        self._life = life
        if not self._full:
            self._add(name="process_name", ph="M", args={"name": f"life {life}"})

    def span(self, waiter: Waiter, now: float) -> None:
        """A wait that has ended, at `now` of the loop's clock."""
        took_s = now - waiter.since
        if self._full or waiter.idle or took_s < _SHORTEST_S or waiter.task is None:
            return
        began_us = (time.time() - took_s) * 1e6
        tracks = [waiter.task.get_name()]
        if waiter.on == "process learner":  # one request at a time: a row of its own
            tracks.append(waiter.on)
        for track in tracks:
            self._add(name=waiter.what, ph="X", ts=began_us, dur=took_s * 1e6, tid=self._track(track))

    def sample(self, moment: Moment) -> None:
        """What the processes use, once a beat."""
        if self._full:
            return
        now_us = moment.at * 1e6
        every = {"controller": moment.vitals} | {process.name: process.vitals for process in moment.processes}
        self._add(name="memory (MB)", ph="C", ts=now_us, args={name: v.memory_mb for name, v in every.items()})
        self._add(name="descriptors", ph="C", ts=now_us, args={name: v.descriptors for name, v in every.items()})
        asked = {process.name: process.asked for process in moment.processes}
        self._add(name="requests in flight", ph="C", ts=now_us, args=asked)

    def flush(self) -> None:
        """Appends what has come together. Raises `OSError`."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        with self._path.open("ab") as file:
            if file.tell() == 0:
                file.write(b"[\n")
            for line in lines:
                if file.tell() > self._max_bytes:
                    self._full = True
                    full = {"name": "the timeline is full", "ph": "i", "s": "g", "ts": time.time() * 1e6}
                    file.write(orjson.dumps(full | {"pid": self._life}) + b",\n")
                    return
                file.write(line)

    def _track(self, name: str) -> int:
        track = self._tracks.get(name)
        if track is None:
            track = self._tracks[name] = len(self._tracks) + 1
            self._add(name="thread_name", ph="M", tid=track, args={"name": name})
        return track

    def _add(self, **event: Any) -> None:
        self._lines.append(orjson.dumps({"pid": self._life, **event}) + b",\n")
