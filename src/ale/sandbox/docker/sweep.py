"""Labels, and the removal of what carries them: of an engine that closes, and of engines that were killed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ale.errors import SandboxError
from ale.sandbox.docker.daemon import Daemon, Refused, absent
from ale.sandbox.state import PREFIX, owner_lives, start_time

logger = logging.getLogger(__name__)

ENGINE, WHERE, RUN = "ale.engine", "ale.where", "ale.run"
_NOT_FOUND, _CONFLICT = 404, 409


# The engines that are open in this process: one that closed while its daemon was dead is swept like a killed one.
_living: set[str] = set()


@contextmanager
def living(engine: str) -> Iterator[None]:
    """While the engine is open: nobody sweeps what is its."""
    _living.add(engine)
    try:
        yield
    finally:
        _living.discard(engine)


def _is_dead(engine: str) -> bool:
    if not engine.startswith(PREFIX):
        return False
    of_this_process = engine.startswith(f"{PREFIX}{os.getpid()}-{start_time(os.getpid())}-")
    return engine not in _living if of_this_process else not owner_lives(engine)


def here() -> str:
    """Names this boot of this machine and the pid namespace in which an engine's pid means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def labels(engine: str, run: str = "") -> dict[str, str]:
    """On everything that the engine makes. `engine`: the name of its directory, which holds its pid and start time."""
    return {ENGINE: engine, WHERE: here(), RUN: run}


async def sweep(daemon: Daemon) -> list[str]:
    """Removes what engines that were killed left with this daemon; their names.

    Only what an engine of this boot and pid namespace made can be told from what a living one uses; the rest is left
    alone, and found by `docker ps -a --filter label=ale.engine`.
    """
    owners: set[str] = set()
    for found in [*await _containers(daemon, WHERE, here()), *await _images(daemon, WHERE, here())]:
        owners.add((found["Labels"] or {}).get(ENGINE, ""))
    owners.update((found["Labels"] or {}).get(ENGINE, "") for found in await _volumes(daemon, WHERE, here()))
    removed = []
    for name in sorted(filter(_is_dead, owners)):
        try:
            await remove_all(daemon, name)
            removed.append(name)
        except SandboxError as error:  # it must not keep this engine, and every later one, from opening
            logger.warning("what the dead engine %s left with Docker cannot be removed now: %s", name, error)
    return removed


async def remove_all(daemon: Daemon, engine: str) -> None:
    """Removes every container, image and volume of an engine, in that order: each holds the next.

    Raises SandboxError for the first that cannot be removed, after it has tried the others.
    """
    failed: list[SandboxError] = []
    for found in await _containers(daemon, ENGINE, engine):
        with _noting(failed):
            await daemon.remove(daemon.container(found["Id"]))
    with _noting(failed):
        await _remove_images(daemon, engine)
    for found in await _volumes(daemon, ENGINE, engine):
        with _noting(failed), absent(_NOT_FOUND):
            async with daemon.calling("remove a volume"):
                volume = await daemon.docker.volumes.get(found["Name"])
                await volume.delete()
    if failed:
        raise failed[0]


@contextmanager
def _noting(failed: list[SandboxError]) -> Iterator[None]:
    try:
        yield
    except SandboxError as error:
        failed.append(error)


async def _remove_images(daemon: Daemon, engine: str) -> None:
    images = [found["Id"] for found in await _images(daemon, ENGINE, engine)]
    while images:
        # One on which another stands is refused until that has gone.
        left = [image for image in images if not await remove_image(daemon, image)]
        if len(left) == len(images):
            break
        images = left


async def remove_image(daemon: Daemon, image: str) -> bool:
    """Whether it is gone now; False: something stands on it. Its parents stay: who owns them is not told."""
    try:
        with absent(_NOT_FOUND):
            async with daemon.calling("remove an image"):
                await daemon.docker.images.delete(image, noprune=True)
    except Refused as error:
        if error.status != _CONFLICT:
            raise
        return False
    return True


async def _containers(daemon: Daemon, label: str, value: str) -> list[dict[str, Any]]:
    async with daemon.calling("list containers"):
        found = await daemon.docker.containers.list(all=True, filters={"label": [f"{label}={value}"]})
    return [{"Id": one.id, "Labels": one["Labels"]} for one in found]


async def _images(daemon: Daemon, label: str, value: str) -> list[dict[str, Any]]:
    async with daemon.calling("list images"):
        found: list[dict[str, Any]] = await daemon.docker.images.list(all=True, filters={"label": [f"{label}={value}"]})
    return found


async def _volumes(daemon: Daemon, label: str, value: str) -> list[dict[str, Any]]:
    async with daemon.calling("list volumes"):
        found = await daemon.docker.volumes.list(filters={"label": [f"{label}={value}"]})
    return found["Volumes"] or []
