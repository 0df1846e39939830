"""A vLLM server that a run starts for itself: its command line, its process, its last words.

It listens on a unix socket in a directory of its own: no port to collide on, and the routes that change weights are
open to nobody else.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ale.config import RunConfig
from ale.errors import ConfigError, WorkerDied
from ale.policy.vllm_client import FLAGS
from ale.policy.vllm_launch import PARENT

_TAIL_BYTES = 16384
_GRACE_S = 5.0  # to end by itself when it is told to, before it is killed
_LAST_WORDS_S = 1.0

INSTALL = (
    "make an environment for it (on CPU `just vllm` makes .venv-vllm; on a GPU: pip install 'ale[vllm]' in a new one) "
    "and name its interpreter in policy.python"
)


def python_of(config: RunConfig) -> str:
    """The interpreter that runs the servers. Raises `ConfigError` when there is no vLLM to run."""
    if not config.policy.python:
        if find_spec("vllm") is None:
            raise ConfigError(f'policy.kind = "vllm" needs vLLM, which is not installed here: {INSTALL}.')
        return sys.executable
    path = Path(config.policy.python).expanduser()
    if not os.access(path, os.X_OK):
        raise ConfigError(f"policy.python: there is no interpreter {path}.")
    return str(path.absolute())


def command(config: RunConfig, model: Path, socket: Path) -> list[str]:
    """What starts a server for this run."""
    c = config.policy
    return [
        python_of(config),
        *("-m", "ale.policy.vllm_launch", "--uds", str(socket), "--model", str(model), *FLAGS),
        *("--dtype", c.dtype),
        *("--max-model-len", str(_longest(config, model))),
        *("--max-num-seqs", str(config.rollout.engine_rows or config.rollout.concurrency)),
        *("--kv-cache-memory-bytes", str(int(c.kv_cache_gb * 2**30))),
        *(() if c.compile else ("--enforce-eager",)),
        *("--disable-uvicorn-access-log",),
        *c.arguments,
    ]


def environment(config: RunConfig, number: int, scratch: Path) -> dict[str, str]:
    """Variables of the replica `number`."""
    c = config.policy
    env = {
        PARENT: str(os.getpid()),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": str(scratch),
        "HF_HUB_OFFLINE": "1",
    }
    if c.devices:
        env["CUDA_VISIBLE_DEVICES"] = c.devices[number]
    cores = sorted(os.sched_getaffinity(0))
    ours = [cores[(number * config.model.threads + i) % len(cores)] for i in range(config.model.threads)]
    env.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(set(ours)))))
    )
    return env


def _longest(config: RunConfig, model: Path) -> int:
    """Positions that a sequence may have: those an episode may use, as far as the model has them."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        limit = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
        if limit:
            return min(int(limit), config.agent.max_context_tokens)
    return config.agent.max_context_tokens


class ServerProcess:
    """Starts, ends and outlives its child, again and again. `on_exit` is called when the child has ended by itself."""

    def __init__(self, command: Sequence[str], env: dict[str, str], on_exit: Callable[[], None]) -> None:
        self._command = list(command)
        self._env = env
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._tail = b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        await self.stop()
        self._tail = b""
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            env=os.environ | self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # a group of its own: the server has children, and Ctrl-C is not for them
        )
        self._tasks = [
            asyncio.create_task(self._read(process), name="output of a vLLM server"),
            asyncio.create_task(self._wait(process), name="end of a vLLM server"),
        ]

    async def stop(self) -> None:
        """Ends the server and all its children; nothing where none runs."""
        if self._process is None:
            return
        try:
            if self.running:
                self._signal(signal.SIGTERM)
                await asyncio.wait({self._tasks[1]}, timeout=_GRACE_S)
        finally:
            self._signal(signal.SIGKILL)  # its children too, which may be there without it
            await self._process.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._process = None

    async def death(self) -> WorkerDied:
        """What to raise when it has ended by itself."""
        assert self._process is not None
        await asyncio.wait({self._tasks[0]}, timeout=_LAST_WORDS_S)
        said = self._tail.decode(errors="replace").strip() or "it printed nothing"
        return WorkerDied(f"a vLLM server ended (exit code {self._process.returncode}); its last words:\n{said}")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while data := await process.stdout.read(1 << 16):
            self._tail = (self._tail + data)[-_TAIL_BYTES:]

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._on_exit()
