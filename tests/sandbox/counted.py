"""What a fault must not leave behind, counted: what one engine, or one directory of engines, holds on this machine."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ale.errors import SandboxError
from ale.sandbox.state import PREFIX, processes_on


class Held(NamedTuple):
    processes: int
    mounts: int
    cgroups: int
    files: int
    """In the directories of sandboxes, layers and transfers."""
    tasks: int


def held_by(engine: Any) -> Held:
    """What an engine of the local backend that is open in this process holds. For use while nothing is under way."""
    state = Path(engine.capabilities()["state"])
    return Held(
        processes=len(processes_on(state.name)),
        mounts=len(mounts_below(state)),
        cgroups=sum(len(subgroups(Path(group))) for group in (state / "cgroups").read_text().splitlines()),
        files=sum(1 for folder in ("boxes", "layers", "scratch") for _ in (state / folder).rglob("*")),
        tasks=len(asyncio.all_tasks()),
    )


def left_in(state: Path, groups: set[str]) -> list[str]:
    """What is left of the engines that were killed and had their directories in `state`, a word each."""
    left = [path.name for path in state.iterdir()]
    left += mounts_below(state)
    left += [group for group in groups if os.path.exists(group)]
    for name in {Path(group).name for group in groups}:
        left += [f"process {pid}" for pid in processes_on(name)]
    return left


def groups_in(state: Path) -> set[str]:
    """The cgroups of the engines whose directories are in `state`, as their records have them."""
    found: set[str] = set()
    for record in state.glob(f"{PREFIX}*/cgroups"):
        found.update(record.read_text().splitlines())
    return found


def mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{folder}/")]


def subgroups(group: Path) -> list[Path]:
    return [path for path in group.glob("*") if path.is_dir() and path.name != "home"] if group.is_dir() else []


def descriptors() -> Counter[str]:
    """The open files of this process. Two countings are compared by what the later one has more: a kept-alive
    connection of an engine that other tests share may end meanwhile, and is no business of theirs."""
    gc.collect()
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{fd}")] += 1
        except FileNotFoundError:  # the one that lists them
            continue
    return found


def below(pid: int) -> list[int]:
    """Every process below another one, by what the kernel says now."""
    found, todo = [], [pid]
    while todo:
        with suppress(OSError):
            children = [int(word) for task in Path(f"/proc/{todo.pop()}/task").iterdir()
                        for word in (task / "children").read_text().split()]  # fmt: skip
            found += children
            todo += children
    return found


async def moment(chance: random.Random, longest_s: float) -> None:
    await asyncio.sleep(chance.uniform(0, longest_s))


async def failure_on_a_full_disk(
    work: Coroutine[Any, Any, None], disk: Path, chance: random.Random, *, longest_s: float, deadline_s: float
) -> BaseException | None:
    """How `work` fails, if it does, on a disk that is full but for a little from some moment of it on. There is room
    again afterwards."""
    working = asyncio.ensure_future(work)
    await moment(chance, longest_s)
    full, ballast = os.statvfs(disk), disk / "ballast"
    left = chance.choice((0, 0, 100_000, 600_000, 1_200_000))
    with open(ballast, "wb") as file, suppress(OSError):  # noqa: ASYNC230
        os.posix_fallocate(file.fileno(), 0, max(1, full.f_bavail * full.f_frsize - left))
    async with asyncio.timeout(deadline_s):
        await asyncio.wait([working])
    ballast.unlink()
    error = working.exception()
    assert error is None or isinstance(error, SandboxError | OSError), error
    return error
