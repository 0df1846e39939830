"""Opening the policy that a configuration names: the embedded engine, vLLM servers of the run's own, or others'."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ale.config import RunConfig
from ale.errors import ConfigError, WorkerDied
from ale.messages import OpenEngine
from ale.policy.embedded import open_embedded
from ale.policy.port import KeptPolicy
from ale.waiting import held_up

if TYPE_CHECKING:
    from ale.policy.replica import Weights

_MEMORY = Path("/dev/shm")
_PREFIX = "ale-weights-"


class Learning(NamedTuple):
    """How the weights of a learner get to the policy: the ring it publishes to, and what has it write a directory."""

    weights_fd: int
    slots: int
    save: Callable[[Path], Awaitable[None]]


@asynccontextmanager
async def open_policy(config: RunConfig, model: Path, learning: Learning | None) -> AsyncIterator[KeptPolicy]:
    """Its weights are those of `model`, version 0, until others are loaded. Raises `UserError` for what cannot be."""
    if config.policy.kind == "embedded":
        settings = OpenEngine(
            model=str(model),
            weights_fd=learning.weights_fd if learning else None,
            slots=learning.slots if learning else 0,
            threads=config.model.threads,
            rows=config.rollout.engine_rows or config.rollout.concurrency,
            precision=config.model.precision,
            record_routing=learning is not None and config.algorithm.routing_replay,
        )
        async with open_embedded(
            settings,
            turn_deadline_s=config.policy.turn_deadline_s,
            restarts=config.watchdog.restarts,
            heartbeat_s=patience_s(config),
        ) as policy:
            yield policy
    else:
        async with _open_served(config, model, learning) as served:
            yield served


def patience_s(config: RunConfig) -> float:
    """How long the embedded engine may be at one step: the first of many long prompts takes a large part of a turn, and
    of a model for which turns were given more time, more. 0: for ever."""
    heartbeat_s = config.watchdog.heartbeat_s
    return max(heartbeat_s, config.policy.turn_deadline_s / 2) if heartbeat_s else 0.0


@asynccontextmanager
async def _open_served(config: RunConfig, model: Path, learning: Learning | None) -> AsyncIterator[KeptPolicy]:
    try:
        from ale.policy.replica import Replica, Weights
        from ale.policy.served import ServedPolicy
        from ale.policy.vllm_client import VllmClient
        from ale.policy.vllm_process import command, environment
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise ConfigError(
            f'policy.kind = "{config.policy.kind}" speaks HTTP by aiohttp, which is not installed: '
            "pip install 'ale[vllm-client]'."
        ) from None
    c = config.policy
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(_scratch(c.weights_dir))
        first = _first(model)
        bounds: dict[str, Any] = {
            "start_deadline_s": c.start_deadline_s,
            "sync_deadline_s": c.sync_deadline_s,
            "silence_s": c.turn_deadline_s / 2,
            "restarts": c.restarts,
        }
        if c.kind == "vllm":
            sockets = [scratch / f"{number}.sock" for number in range(c.replicas)]
            commands = [command(config, first.path, socket) for socket in sockets]
            replicas = [
                Replica(
                    f"vLLM replica {number}",
                    VllmClient("http://vllm", socket=socket),
                    first,
                    command=commands[number],
                    env=environment(config, number, scratch),
                    **bounds,
                )
                for number, socket in enumerate(sockets)
            ]
        else:
            replicas = [Replica(f"the vLLM server {url}", VllmClient(url), first, **bounds) for url in c.urls]

        async def export(version: int) -> Weights:
            """The one before stays: a server that is brought back meanwhile may be reading it."""
            assert learning is not None
            target = scratch / f"version-{version}"
            await learning.save(target)
            for old in scratch.glob("version-*"):
                if old.name not in (target.name, f"version-{version - 1}"):
                    await asyncio.to_thread(shutil.rmtree, old)
            return Weights(version, target)

        for replica in replicas:
            await stack.enter_async_context(replica.kept())
        with held_up("the vLLM servers to come up", release="their start", deadline_s=c.start_deadline_s):
            for replica in replicas:
                try:
                    await replica.until_live(0)
                except WorkerDied as error:  # it never came up: its address, the model or the memory is wrong
                    raise ConfigError(f'policy.kind = "{c.kind}": {error}') from error
        yield ServedPolicy(
            replicas,
            export if learning is not None else None,
            turn_deadline_s=c.turn_deadline_s,
            sync_deadline_s=c.sync_deadline_s + c.start_deadline_s,
        )


def _first(model: Path) -> Weights:
    """The servers see the same files, but stand elsewhere."""
    from ale.policy.replica import Weights

    return Weights(0, model.absolute())


@contextmanager
def _scratch(weights_dir: str) -> Iterator[Path]:
    """A directory for weights and sockets, in memory where there is such a place. What a killed run has left is removed
    by the next: it is locked by whoever uses it."""
    parent = (
        Path(weights_dir) if weights_dir else _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    )
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_unless_used(left)
        path, lock = _locked_directory(parent)
    except OSError as error:
        raise ConfigError(f"policy.weights_dir: {parent} cannot be written: {error}.") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """A new one and the descriptor that holds its lock. Another run may have taken it for a dead one's before that."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).absolute()
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def _remove_unless_used(path: Path) -> None:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # it has just gone, or is another user's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
