"""TensorBoard events beside metrics.jsonl: `tensorboard --logdir runs`.

Written by tensorboardX's synchronous writer: its usual one hands events to a thread, which would hold up the run when
the disk is full.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ale.errors import RunFolderError


class Board:
    """One event file for each life of the run; `after` is the last update that the lives before it had recorded."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self._path = path
        try:
            path.mkdir(exist_ok=True)
            life = len(list(path.iterdir()))
            self._events = EventsWriter(str(path / "events"), f".{life}")
        except OSError as error:
            raise RunFolderError.cannot_write(path, error) from error
        if life:  # tells the reader to forget what it saw of later updates
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), after + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one update. Raises `RunFolderError`."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(summary=Summary(value=scalars)), step)

    def close(self) -> None:
        self._events.close()

    def _write(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        try:
            self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            raise RunFolderError.cannot_write(self._path, error) from error
