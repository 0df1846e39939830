"""The recording of a run: the points that its loop passed, in order, and the answers that came from outside.

    record = as in the journal (`records.py`)
    body   = [kind, name, answer], as msgpack; deflated where that makes it shorter, which the first byte tells

A point is written when it is passed, which is before the journal has what follows from it: what the journal holds, the
recording can explain. Each life of a run that is resumed begins with an entry of its own.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ale.data.records import HEADER, Records, read_records
from ale.errors import RunFolderError
from ale.tape import Point
from ale.task import Actions, Task

_PLAIN, _DEFLATED = b"\0", b"\1"
_LEVEL = 1
NOTHING = msgspec.Raw(msgspec.msgpack.encode(None))
_SHORT = 128  # bytes below which nothing is gained


class Stub(msgspec.Struct, frozen=True):
    """What the loop needs of a task: `Stub(id="copy-7", family="copy", level=1, actions="bash", drawn=415)`."""

    id: str
    family: str
    level: int
    actions: Actions
    drawn: int

    def task(self) -> Task:
        return Task(id=self.id, family=self.family, level=self.level, actions=self.actions)


class Life(msgspec.Struct, frozen=True):
    """`Life(number=2, journal=40960, version=7)`: the loop of this life begins; where the journal ends then, and what
    the policy samples from."""

    number: int
    journal: int
    version: int


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What came from outside: a `value`, as msgpack; or an `error`, by its class and what it says; or neither, where
    whoever asked did not wait for the end."""

    value: msgspec.Raw = NOTHING
    error: tuple[str, str] | None = None

    @property
    def given_up(self) -> bool:
        return self.error is None and self.value == NOTHING


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """`Entry("end", "g3/1")`. `kind` is a point of `ale.tape`, or "life" or "task"."""

    kind: str
    name: str
    answer: Answer | Life | Stub | None = None


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    name: str
    body: msgspec.Raw = NOTHING


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Entry).decode
_BODIES: dict[str, Any] = {"life": Life, "task": Stub}


class Recording(Records):
    """The tape of a run that is recorded: appends to the file `recording` of its folder."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it; cuts off a torn last record."""
        super().__init__(path, lambda said: damaged(path, said))
        try:
            end = sum(HEADER.size + len(body) for body in self.bodies())
            self.cut(end)
        except BaseException:
            self.close()
            raise
        self._rolls = False
        self._started = set[str]()

    def begin(self, life: Life, running: Iterable[str]) -> None:
        """From here on it is written down what happens. `running`: the rollouts that are to run again."""
        self._rolls = True
        self._started.update(running)
        self._write("life", str(life.number), life)

    def task(self, task: Task, drawn: int) -> None:
        if self._rolls:
            self._write("task", str(drawn), Stub(task.id, task.family, task.level, task.actions, drawn))

    def covers(self, rollout: str) -> bool:
        return rollout in self._started

    async def reach(self, point: Point, name: str) -> None:
        if self._rolls:
            self._write(point, name)
            if point == "start":
                self._started.add(name)
            elif point == "end":
                self._started.discard(name)

    async def answer(self, point: Point, name: str, ask: Callable[[], Awaitable[Any]], type_: Any) -> Any:
        try:
            value = await ask()
        except asyncio.CancelledError:
            self._started.discard(name)  # its episode is over: nobody will pass its end
            self._write(point, name, Answer())
            raise
        except Exception as error:
            self._write(point, name, Answer(error=(type(error).__name__, str(error))))
            raise
        self._write(point, name, Answer(value=msgspec.Raw(_encode(value))))
        return value

    def _write(self, kind: str, name: str, answer: Answer | Life | Stub | None = None) -> None:
        body = _encode(Entry(kind, name, answer))
        short = zlib.compress(body, _LEVEL) if len(body) > _SHORT else body
        self.add(_DEFLATED + short if len(short) < len(body) else _PLAIN + body)


def check_recorded(path: Path) -> None:
    """Raises `RunFolderError` where there is no recording."""
    if not path.is_file():
        raise RunFolderError(
            f"{path.parent} was not recorded: there is no {path.name} in it. A run is recorded from its start, with "
            "ale train --record, or record = true in its configuration."
        )


def read_recording(path: Path) -> Iterator[Entry]:
    """Every entry, in order; those of one file of a run that may still be going on. Raises `RunFolderError`."""
    check_recorded(path)
    for packed in read_records(path, path.stat().st_size, lambda said: damaged(path, said)):
        try:
            body = zlib.decompress(packed[1:]) if packed[:1] == _DEFLATED else packed[1:]
            raw = _decode(body)
            answer = (
                None if raw.body == NOTHING else msgspec.msgpack.decode(raw.body, type=_BODIES.get(raw.kind, Answer))
            )
        except (zlib.error, msgspec.MsgspecError) as error:
            raise damaged(path, f"another version of ale wrote it ({error})") from error
        yield Entry(raw.kind, raw.name, answer)


def damaged(path: Path, said: str) -> RunFolderError:
    return RunFolderError(
        f"The recording {path} is damaged: {said}. The run cannot be replayed; resuming it needs no recording."
    )
