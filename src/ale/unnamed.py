"""Tasks that wait without saying for what, found by where they stand in their code.

No wait should be of this kind for long: it is how one that was forgotten, or that belongs to somebody else's code, is
seen all the same.
"""

from __future__ import annotations

import asyncio
import os
import sys
from functools import cache
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from ale.mailbox import Wait

_HERE = os.path.dirname(__file__)
# What everybody awaits through: the line that called it says more.
_PLUMBING = (os.path.dirname(asyncio.__file__), os.path.join(os.path.dirname(os.__file__), "contextlib.py"))


class Unnamed:
    def __init__(self) -> None:
        self._since: WeakKeyDictionary[asyncio.Task[Any], tuple[str, float]] = WeakKeyDictionary()

    def look(self, known: set[asyncio.Task[Any]], now: float) -> list[Wait]:
        """Every task but the current one and the `known`. "Since" is when it was first seen at that place."""
        found = []
        current = asyncio.current_task()
        for task in asyncio.all_tasks():
            if task is current or task in known:
                continue
            place = place_of(task)
            seen, since = self._since.get(task, ("", now))
            if seen != place:
                since = now
                self._since[task] = (place, since)
            name = task.get_name()
            found.append(Wait(name, place, now - since, None, of=name.split("/")[0], named=False))
        return found


def place_of(task: asyncio.Task[Any]) -> str:
    """`"something at actors/generator.py:122, in _run_members"`: the innermost line that is not asyncio's."""
    frame = None
    awaited: Any = task.get_coro()
    while awaited is not None:
        here = next((f for name in _FRAMES if (f := getattr(awaited, name, None)) is not None), None)
        if here is not None and (frame is None or not here.f_code.co_filename.startswith(_PLUMBING)):
            frame = here
        awaited = next((a for name in _AWAITED if (a := getattr(awaited, name, None)) is not None), None)
    return f"something at {line_of(frame)}" if frame is not None else "its first turn"


def line_of(frame: FrameType) -> str:
    return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}, in {frame.f_code.co_name}"


@cache
def _shown(path: str) -> str:
    return os.path.relpath(path, _HERE)


def stack_of(thread: int, depth: int = 6) -> str:
    """Where a thread is: the innermost lines, outermost first."""
    frame, lines = sys._current_frames().get(thread), list[str]()
    while frame is not None and len(lines) < depth:
        lines.append(line_of(frame))
        frame = frame.f_back
    return " -> ".join(reversed(lines)) or "unknown"


_FRAMES = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")
