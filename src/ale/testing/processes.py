"""Looking at processes from outside: which there are, and whether they end."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def processes_with(text: str) -> set[int]:
    """The processes that have `text` in their environment, arguments or mounts, this one excepted."""
    found = set[int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            for name in ("environ", "cmdline", "mountinfo"):
                with suppress(OSError):
                    if text.encode() in (entry / name).read_bytes():
                        found.add(int(entry.name))
    return found


def ended(pidfds: Iterable[int], *, deadline_s: float = 10.0) -> int:
    """How many of these processes end within the deadline. Closes the descriptors."""
    count = 0
    for fd in pidfds:
        count += bool(select.select([fd], [], [], deadline_s)[0])
        os.close(fd)
    return count
