"""The last moment of a run: who waits for what, how the processes are, when something was finished last.

A live run writes it to `moment.json` in its folder every second, so that the file of a dead one holds its last. It is
replaced as a whole; on a disk that takes nothing more it is written over in place, within the room that it has.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from ale.errors import RunFolderError
from ale.mailbox import Wait
from ale.vitals import ProcessState, Vitals

NAME = "moment.json"
BEAT_S = 1.0
# Room kept in the file, so that a last moment fits where nothing else does any more.
_ROOM = 1 << 16
_MOST_WAITS = 1000


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """`Moment(at=1790000000.0, pid=4711, phase="train", step=12, total=140, silent_s=3.1, ...)`."""

    at: float
    """Seconds since 1970."""
    pid: int
    vitals: Vitals
    """Of the controller."""
    phase: str = ""
    step: int = 0
    total: int = 0
    silent_s: float = 0.0
    """Since something was finished that brings the run on."""
    progress: str = ""
    """What that was."""
    failures: dict[str, int] = {}
    """What ended otherwise since, by reason."""
    waits: tuple[Wait, ...] = ()
    """The longest first."""
    processes: tuple[ProcessState, ...] = ()
    notes: tuple[str, ...] = ()
    """What is out of the ordinary: a clock that jumped, a disk that is full."""
    counters: dict[str, int] = {}
    """Restarts and what they cost, since the run's start."""
    held_s: float = 0.0
    """How long the controller's event loop has not turned; 0: it turns."""
    ended: str = ""
    """How the run ended, once it has: "done", or the error."""


def write(folder: Path, moment: Moment) -> None:
    """Raises `OSError` when not even the old file can be written over."""
    data = msgspec.json.encode(msgspec.structs.replace(moment, waits=moment.waits[:_MOST_WAITS])) + b"\n"
    data = data.ljust(_ROOM)
    path, new = folder / NAME, folder / f".{NAME}.new"
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            fewer = len(moment.waits)
            while len(data) > size and fewer:
                fewer //= 2
                shorter = msgspec.structs.replace(moment, waits=moment.waits[:fewer])
                data = msgspec.json.encode(shorter) + b"\n"
            os.pwrite(fd, data.ljust(size), 0)
        finally:
            os.close(fd)


def read(folder: Path) -> Moment:
    """Raises `RunFolderError`."""
    path = folder / NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Moment)
    except FileNotFoundError:
        raise RunFolderError(
            f"{folder} has no {NAME}: the run was made by a version of ale that did not write it, or it ended before "
            "its first second."
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}. The next moment of a live run replaces it.") from error
