"""The journal of a run: what happened, in order, in checksummed records (`records.py`).

    body = msgpack of [seconds since the run began, event]

An event is in the journal before anything acts on what it says.

**Format.** The first event of a run says in which format the journal is, and so does each `Resumed`, for another life
may be that of another version of ale. A journal that says nothing is of format 0. What is added to events has a
default, so that older records are read as they were meant; a change that older code would misread raises `FORMAT`, and
that code then refuses the journal by its number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ale.data.events import Began, Event, Resumed
from ale.data.records import HEADER, Records, read_records
from ale.errors import RunFolderError

logger = logging.getLogger(__name__)

FORMAT = 1
"""What this version writes. It reads all that are not higher."""


class Journal(Records):
    """Appends `Event`s. `elapsed_s` counts on from the last record: the run's wall time over all of its lives."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it. Raises `RunFolderError` when something in it is damaged."""
        super().__init__(path, lambda said: _damaged(path, said))
        self._decoder = msgspec.msgpack.Decoder(tuple[float, Event])
        self._encoder = msgspec.msgpack.Encoder()
        try:
            self._before_s = self._mend()
        except BaseException:
            self.close()
            raise
        self._opened = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._opened

    def write(self, event: Event) -> None:
        """When this returns, no end of this process can undo it. Raises `RunFolderError`: the disk is full."""
        self.add(self._encoder.encode((self.elapsed_s, event)))

    def read(self, offset: int = 0) -> Iterator[Event]:
        """The events from `offset` on, which is what `size` was at some time."""
        for body in self.bodies(offset):
            yield self._decode(body)[1]

    def _decode(self, body: bytes) -> tuple[float, Event]:
        try:
            elapsed_s, event = self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise self.damaged(f"another version of ale wrote it ({error})") from error
        _check_format(self.path, event)
        return elapsed_s, event

    def _mend(self) -> float:
        """Cuts off a torn last record. Returns the time of the last whole one."""
        elapsed_s, end = 0.0, 0
        for body in self.bodies():
            elapsed_s = self._decode(body)[0]
            end += HEADER.size + len(body)
        if end < self.size:
            logger.warning("%s: the last record was cut off in the middle; its %d bytes go", self.path, self.size - end)
            self.cut(end)
        return elapsed_s


def read_journal(path: Path) -> Iterator[Event]:
    """The events of a journal that may be that of a living run: reads only. Raises `RunFolderError`."""
    decoder = msgspec.msgpack.Decoder(tuple[float, Event])
    for body in read_records(path, path.stat().st_size, lambda said: _damaged(path, said)):
        try:
            event = decoder.decode(body)[1]
        except msgspec.MsgspecError as error:
            raise _damaged(path, f"another version of ale wrote it ({error})") from error
        _check_format(path, event)
        yield event


def _check_format(path: Path, event: Event) -> None:
    if isinstance(event, Began | Resumed) and event.format > FORMAT:
        raise RunFolderError(
            f"The journal {path} is of format {event.format}, which a newer version of ale wrote; this one reads "
            f"formats up to {FORMAT}. Resume the run with that version."
        )


def _damaged(path: Path, said: str) -> RunFolderError:
    return RunFolderError(
        f"The journal {path} is damaged: {said}. The run cannot be resumed from it: put the file back as it "
        "was, or start the run anew with --overwrite. Its checkpoints can still be evaluated."
    )
