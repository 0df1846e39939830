"""What the kernel tells of a process: its state, its memory, its descriptors, its processor time."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Literal

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20

Condition = Literal["running", "sleeping", "in the kernel", "stopped", "dead", "gone", "unknown"]
_CONDITIONS: dict[str, Condition] = {
    "R": "running",
    "S": "sleeping",
    "I": "sleeping",
    "D": "in the kernel",
    "T": "stopped",
    "t": "stopped",
    "Z": "dead",
    "X": "dead",
}


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """`Vitals(condition="running", memory_mb=812.5, descriptors=14, cpu_s=93.2, threads=3)`."""

    condition: Condition
    memory_mb: float = 0.0
    descriptors: int = 0
    cpu_s: float = 0.0
    threads: int = 0


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process as its owner sees it: `ProcessState(name="engine", pid=4711, vitals=Vitals(...), beat_s=0.4,
    doing="12 turns", doing_s=3.0, asked=12, in_hand=12, steps=81230)`. Times in seconds ago."""

    name: str
    pid: int
    vitals: Vitals
    beat_s: float | None = None
    """Since its last heart-beat; None where it has none."""
    doing: str = ""
    """What it said then that it does; empty: nothing."""
    doing_s: float = 0.0
    """For how long, by its last word."""
    step_s: float = 0.0
    """Since it last finished a piece of its work, by its last word."""
    steps: int = 0
    asked: int = 0
    """Requests that wait for its answer."""
    in_hand: int | None = None
    """Of these, those that it says it has: fewer means that something was lost on the way."""
    busy_s: float = 0.0
    """Time that it spent on requests, since its start."""


def look(pid: int) -> Vitals:
    """A process of this user. One that is not there is "gone"; where there is no /proc, "unknown"."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return Vitals(condition="gone" if os.path.exists("/proc/self/stat") else "unknown")
    except OSError:
        return Vitals(condition="gone")
    descriptors = 0
    with suppress(OSError):  # not ours to see
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Vitals(
        condition=_CONDITIONS.get(fields[0], "unknown"),
        memory_mb=int(fields[21]) * _PAGE_MB,
        descriptors=descriptors,
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
        threads=int(fields[17]),
    )
