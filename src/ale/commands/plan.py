"""`ale train CONFIG --dry-run`: what the run would need, of the devices that are there or of others."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ale.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ale.config import RunConfig
    from ale.plan import Devices, Phase, Plan

_PART = "a node is written as 8x80: eight GPUs of 80 GB"


def print_plan(config: RunConfig, devices: str | None) -> bool:
    """Prints the plan; whether the run would fit. Raises `UserError`."""
    from transformers.utils import logging

    from ale.models.shape import shape_of
    from ale.plan import plan

    logging.set_verbosity_error()  # a configuration from elsewhere need not name what this version of it knows
    made = plan(config, shape_of(_model_config(config)), parse_devices(devices) if devices else present_devices())
    for line in describe(made, config):
        print(line)
    return made.fits


def parse_devices(text: str) -> Devices:
    """`8x80`. Raises `ConfigError`."""
    from ale.plan import GIB, KNOWN, Device, Devices

    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"--devices {text}: {_PART}.")
    count, size = int(match[1]), int(match[2])
    return Devices("cuda", count, KNOWN.get(size, Device(f"GPU of {size} GB", size * GIB, 0.0, 0.0)))


def present_devices() -> Devices:
    """The GPUs of this machine, or its CPU and memory."""
    import torch

    from ale.plan import CPU_BANDWIDTH, CPU_CORE_FLOPS, GIB, KNOWN, Device, Devices

    if torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        size = round(seen.total_memory / GIB)
        near = min(KNOWN, key=lambda known: abs(known - size))
        figures = KNOWN[near] if abs(near - size) <= near // 16 else Device("", 0, 0.0, 0.0)
        device = Device(seen.name, seen.total_memory, figures.flops, figures.bandwidth)
        return Devices("cuda", torch.cuda.device_count(), device)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Devices("cpu", 1, Device(f"{cores} cores", memory, cores * CPU_CORE_FLOPS, CPU_BANDWIDTH))


def describe(plan: Plan, config: RunConfig) -> list[str]:
    from ale.plan import COMPUTE_SHARE, MEMORY_SHARE

    shape, each = plan.shape, plan.devices.each
    kind = f", {shape.experts} experts, {shape.chosen} of them for a token" if shape.experts else ""
    lines = [
        f"model        {config.model.path}: {shape.kind}, {_count(shape.parameters)} parameters, "
        f"{_count(shape.active)} active{kind}",
        f"devices      {plan.devices.count} x {each.name}, {_gib(each.memory)}" + _not_run(plan),
    ]
    if plan.devices.kind == "cuda":
        lines.append(
            f"layout       {plan.devices.count} ranks of the learner (FSDP2); {plan.engines} engines of "
            f"{plan.tensor_parallel} GPUs on the same GPUs, asleep while it trains"
        )
    else:
        lines.append(f"layout       the learner (learner.ranks {config.learner.ranks}), the embedded engine beside it")
    for phase in plan.phases:
        lines += _phase(phase, "each GPU" if plan.devices.kind == "cuda" else "this machine")
    for line in plan.host:
        lines.append(f"host memory  {line.what}: {_gib(line.size)}")
    lines.append(
        f"KV cache     {plan.kv_token / 1024:.1f} KiB a token; {plan.sequences} sequences of "
        f"{config.agent.max_context_tokens} tokens fit (rollout.concurrency {config.rollout.concurrency})"
    )
    total = sum(plan.flops.values())
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in plan.flops.items() if value)
    lines.append(f"an update    {_count(plan.tokens)} tokens at most, {_flop(total)}: {parts}")
    if plan.seconds:
        lines.append(
            f"estimate     at {COMPUTE_SHARE:.0%} of the peak in products and {MEMORY_SHARE:.0%} of memory's, every "
            "sequence at its longest, the environment's own time left out:"
        )
        lines += [f"               {name:<37} {_time(seconds)}" for name, seconds in plan.seconds.items()]
        lines.append(f"bottleneck   {plan.bottleneck}")
    else:
        lines.append("estimate     none: the speed of these devices is not known")
    lines += [f"note         {remark}" for remark in plan.remarks]
    lines.append("it fits" if plan.fits else "it does not fit")
    return lines


def _not_run(plan: Plan) -> str:
    return " (the learner has not yet run on a GPU)" if plan.devices.kind == "cuda" else ""


def _phase(phase: Phase, where: str) -> list[str]:
    return [
        f"{phase.name}, {where}: {_gib(phase.total)} of {_gib(phase.limit)}" + ("" if phase.fits else ": TOO MUCH"),
        *(f"               {line.what:<37} {_gib(line.size):>10}" for line in phase.lines if line.size),
    ]


def _model_config(config: RunConfig) -> PreTrainedConfig:
    from ale.models.load import read_config
    from ale.models.nano import nano_settings

    if config.model.path == "nano":
        return nano_settings(768)
    directory = Path(config.model.path).expanduser()
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path: {directory} has no config.json; a plan needs nothing else of a model.")
    return read_config(directory)


def _count(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _flop(number: float) -> str:
    return f"{number / 1e15:.3g} PFLOP" if number >= 1e14 else f"{number / 1e12:.3g} TFLOP"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 29 else f"{size / (1 << 20):.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"
