"""What a run would need, before it has any weights: `ale train CONFIG --dry-run`. Pure functions of the configuration,
the model's shape and the devices.

Memory of weights, gradients, optimizer and activations follows from what the learner does and is tested against it on
the CPU. What a GPU holds besides (context, buffers of collectives, fragmentation) is `RESERVE`. Times are estimates
from peak figures and assumed shares of them; the environment's own time is not in them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Literal

import msgspec

from ale.config import RunConfig
from ale.models.shape import ModelShape

GIB = 1 << 30
RESERVE = {"cuda": 4 * GIB, "cpu": GIB}
"""Of a GPU, or of the whole machine: what no tensor is counted for."""
MASTER = 4
"""Bytes of a number of weights, gradients and each of the two moments."""
# Shares of the peak that a run is taken to reach, and bytes/s between GPUs and from the host to one.
COMPUTE_SHARE, MEMORY_SHARE = 0.4, 0.6
LINK, HOST_LINK = 300e9, 25e9


class Device(msgspec.Struct, frozen=True):
    """`Device("H100", 80 * GIB, 989e12, 3.35e12)`: memory, dense bfloat16 FLOP/s and bytes/s of memory, at the peak."""

    name: str
    memory: int
    flops: float
    bandwidth: float


KNOWN = {
    40: Device("A100 40 GB", 40 * GIB, 312e12, 1.56e12),
    80: Device("H100 80 GB", 80 * GIB, 989e12, 3.35e12),
    141: Device("H200 141 GB", 141 * GIB, 989e12, 4.8e12),
    180: Device("B200 180 GB", 180 * GIB, 2250e12, 7.7e12),
}
# A core of the machine that docs/models.md was measured on, in float32; its memory is shared by all.
CPU_CORE_FLOPS, CPU_BANDWIDTH = 106e9, 25e9


class Devices(msgspec.Struct, frozen=True):
    """`Devices("cuda", 8, KNOWN[80])`, or the one machine `Devices("cpu", 1, Device("2 cores", ...))`."""

    kind: Literal["cuda", "cpu"]
    count: int
    each: Device


class Line(msgspec.Struct, frozen=True):
    what: str
    size: int


class Phase(msgspec.Struct, frozen=True):
    """Bytes on one GPU (on the CPU: of the machine) at the peak of a phase."""

    name: str
    lines: tuple[Line, ...]
    limit: int

    @property
    def total(self) -> int:
        return sum(line.size for line in self.lines)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    shape: ModelShape
    devices: Devices
    phases: tuple[Phase, ...]
    host: tuple[Line, ...]
    """Memory of the host, for GPUs."""
    engines: int
    tensor_parallel: int
    kv_token: int
    """Bytes of one position in the KV cache, over all GPUs of an engine."""
    sequences: int
    """That fit into the caches of all engines at the longest context."""
    tokens: int
    """Of an update, every sequence at its longest."""
    flops: dict[str, float]
    """Of an update, by part."""
    seconds: dict[str, float]
    """Of an update, by part; empty for devices whose figures are not known."""
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases) and self.sequences > 0

    @property
    def bottleneck(self) -> str | None:
        return max(self.seconds, key=lambda part: self.seconds[part]) if self.seconds else None


def layer_activations(shape: ModelShape, product: int) -> int:
    """Bytes of a token that one decoder layer keeps for its backward, product inputs of `product` bytes a number.

    Of the layers of Llama and Qwen: two norms (input and normalised, float32), what goes into the products (autocast
    rounds it once for each), keys, queries, values and output of attention, and the gated block or the experts.
    """
    D, a, k = shape.width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    narrow = product < MASTER
    norms = 2 * (2 * 4 * D + 4)
    attention = (3 * product if narrow else 4) * D + product * (2 * a + 2 * k) + 4 * shape.heads
    if shape.kind.startswith("qwen3"):  # norms of queries and keys
        attention += (4 + product) * (a + k) + 4 * (shape.heads + shape.kv_heads)
    if shape.experts:
        block = (
            (2 * product if narrow else 4) * D
            + 4 * shape.experts
            + (16 + product * (1 if narrow else 0)) * shape.chosen
        )
        block += (0 if narrow else 4) * shape.chosen + product * 2 * shape.intermediate * shape.chosen
    else:
        block = (2 * product if narrow else 4) * D + 4 * product * shape.intermediate
    return norms + attention + block


def activations(shape: ModelShape, tokens: int, product: int, checkpointing: bool) -> int:
    """Bytes that a micro-batch keeps between forward and backward, and what one layer works with."""
    kept = layer_activations(shape, product)
    rows = shape.chosen or 1
    work = rows * product * (4 * shape.intermediate + shape.width)
    per_token = 4 * shape.width * shape.layers + kept if checkpointing else kept * shape.layers
    return tokens * (per_token + work)


def mask(tokens: int, context: int) -> int:
    """Bytes of the mask [T, T] of rows that share a prompt: which positions see each other, and the same as numbers."""
    return tokens * context * (1 + MASTER)


def kv_bytes(shape: ModelShape, product: int) -> int:
    return 2 * shape.layers * shape.kv_heads * shape.head_width * product


def trained(config: RunConfig, shape: ModelShape) -> int:
    """Numbers that the optimizer changes. Of adapters: as if every target were a square of the model's width."""
    c = config.learner
    if not c.lora_rank:
        return shape.parameters
    widths = {"q_proj": shape.heads, "o_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
    per_layer = 0
    for target in c.lora_targets:
        out = widths[target] * shape.head_width if target in widths else shape.intermediate
        per_layer += c.lora_rank * (shape.width + out)
    return per_layer * shape.layers


def training(config: RunConfig, shape: ModelShape, limit: int) -> Phase:
    """One rank, at the peak of a backward."""
    c, ranks = config.learner, config.learner.ranks
    product = 2 if config.model.precision == "bfloat16" else 4
    changed = trained(config, shape)
    inside = shape.layer
    lines = [
        Line("weights, float32", MASTER * (shape.parameters + (changed if c.lora_rank else 0)) // ranks),
        Line("gradients, float32", MASTER * changed // ranks),
        Line("optimizer, two moments", 2 * MASTER * changed // ranks),
    ]
    if ranks > 1:
        # This layer and the next one, and this one's gradient before and while it is summed.
        lines.append(Line("embedding, head, their gradients", 2 * MASTER * shape.outside))
        lines.append(Line("gathered: two layers", 2 * product * inside))
        if not c.lora_rank:
            lines.append(Line("gradient of a layer", (product + MASTER) * inside))
    elif product < MASTER:
        lines.append(Line("rounded copies of weights", product * (shape.parameters - shape.outside)))
    tokens = micro_batch(config)
    lines.append(Line(f"activations, {tokens} tokens", activations(shape, tokens, product, c.activation_checkpointing)))
    if config.rollout.group_size > 1:
        lines.append(Line("mask of shared prompts", mask(tokens, config.agent.max_context_tokens)))
    return Phase("training", tuple(lines), limit)


def micro_batch(config: RunConfig) -> int:
    """A sequence is never split: the longest is a micro-batch by itself."""
    return max(config.learner.micro_tokens, config.agent.max_context_tokens)


def plan(config: RunConfig, shape: ModelShape, devices: Devices) -> Plan:
    return _on_gpus(config, shape, devices) if devices.kind == "cuda" else _on_cpu(config, shape, devices)


def _on_gpus(config: RunConfig, shape: ModelShape, devices: Devices) -> Plan:
    """Every GPU has a rank and a part of an engine, which sleeps while the learner works."""
    context, remarks = config.agent.max_context_tokens, []
    limit = devices.each.memory - RESERVE["cuda"]
    if config.learner.ranks != devices.count:
        remarks.append(f"learner.ranks is {config.learner.ranks}; planned with {devices.count}, a rank for each GPU")
        config = msgspec.structs.replace(
            config, learner=msgspec.structs.replace(config.learner, ranks=devices.count, device="cuda")
        )
    train = training(config, shape, limit)
    resident = sum(line.size for line in train.lines[:3]) - train.lines[1].size  # gradients are gone by then
    kv_token = kv_bytes(shape, 2)
    choices = []
    tp = 1
    while tp <= min(devices.count, shape.kv_heads):
        if devices.count % tp == 0 and shape.heads % tp == 0:
            free = limit - resident - 2 * shape.parameters // tp
            choices.append((tp, max(0, free) * tp // (kv_token * context) * (devices.count // tp)))
        tp *= 2
    enough = [choice for choice in choices if choice[1] >= config.rollout.concurrency]
    tp, sequences = enough[0] if enough else max(choices, key=lambda choice: choice[1])
    engines = devices.count // tp
    running = min(sequences, config.rollout.concurrency)
    lines = (
        Line("learner: weights, optimizer", resident),
        Line(f"engine: weights, bfloat16 / {tp}", 2 * shape.parameters // tp),
        Line(f"KV cache, {-(-running // engines)} sequences", -(-running // engines) * context * kv_token // tp),
    )
    if not sequences:
        remarks.append(f"no sequence of {context} tokens fits beside the learner: lower agent.max_context_tokens")
    elif sequences < config.rollout.concurrency:
        remarks.append(f"{sequences} sequences fit, rollout.concurrency is {config.rollout.concurrency}: others wait")
    if not train.fits:
        remarks.append(_cure(config, shape, train))
    slots = config.rollout.max_lag + 2
    return _finish(
        config,
        shape,
        devices,
        phases=(train, Phase("generation", lines, limit)),
        host=(Line(f"weight ring, {slots} versions, float32", slots * MASTER * shape.parameters),),
        engines=engines,
        tp=tp,
        kv_token=kv_token,
        sequences=sequences,
        remarks=remarks,
    )


def _cure(config: RunConfig, shape: ModelShape, train: Phase) -> str:
    """What would make training fit."""
    c, product = config.learner, 2 if config.model.precision == "bfloat16" else 4
    context = config.agent.max_context_tokens

    def size(tokens: int) -> int:
        masks = mask(tokens, min(tokens, context)) if config.rollout.group_size > 1 else 0
        return activations(shape, tokens, product, c.activation_checkpointing) + masks

    free = train.limit - train.total + size(micro_batch(config))
    fits = bisect_right(range(1, micro_batch(config)), free, key=size)
    if not fits:
        return "training does not fit whatever the batch: use more GPUs, or learner.lora_rank"
    said = f"training does not fit; {fits} tokens in a micro-batch would: lower "
    said += "agent.max_context_tokens" if context > fits else "learner.micro_tokens"
    return said if c.activation_checkpointing else said + ", or set learner.activation_checkpointing"


def _on_cpu(config: RunConfig, shape: ModelShape, devices: Devices) -> Plan:
    """Engine and learner side by side in the memory of one machine."""
    context, slots = config.agent.max_context_tokens, config.rollout.max_lag + 2
    limit = devices.each.memory - RESERVE["cpu"]
    product = 2 if config.model.precision == "bfloat16" else 4
    alone = training(config, shape, limit)
    ranks = config.learner.ranks
    train = tuple(Line(line.what, line.size * ranks) for line in alone.lines)
    kv_token = kv_bytes(shape, 4)
    dense = shape.parameters - shape.outside - shape.expert_parameters
    engine = (
        Line(f"weight ring, {slots} versions", slots * MASTER * shape.parameters),
        Line("engine: packed weights", product * dense),
        Line(f"KV cache, {config.rollout.concurrency} sequences", config.rollout.concurrency * context * kv_token),
    )
    free = limit - sum(line.size for line in (*train, *engine[:2]))
    both = Phase("training and generation", (*train, *engine), limit)
    remarks = [] if both.fits else ["it does not fit: lower rollout.concurrency or learner.micro_tokens"]
    return _finish(
        config,
        shape,
        devices,
        phases=(both,),
        host=(),
        engines=1,
        tp=1,
        kv_token=kv_token,
        sequences=max(0, free // (kv_token * context)),
        remarks=remarks,
    )


def _finish(
    config: RunConfig,
    shape: ModelShape,
    devices: Devices,
    *,
    phases: tuple[Phase, ...],
    host: tuple[Line, ...],
    engines: int,
    tp: int,
    kv_token: int,
    sequences: int,
    remarks: list[str],
) -> Plan:
    context = config.agent.max_context_tokens
    batch = config.rollout.group_size * config.rollout.groups_per_step
    tokens = batch * context
    sampled = batch * min(config.agent.max_turns * config.agent.max_turn_tokens, context)
    flops = update_flops(config, shape, tokens)
    flops["generation"] = 2.0 * shape.multiplied * (tokens + sampled)
    running = min(sequences, config.rollout.concurrency, batch * (config.rollout.max_lag + 1))
    seconds = _seconds(config, shape, devices, flops, sampled, engines, tp, running) if running else {}
    return Plan(
        shape=shape,
        devices=devices,
        phases=phases,
        host=host,
        engines=engines,
        tensor_parallel=tp,
        kv_token=kv_token,
        sequences=sequences,
        tokens=tokens,
        flops=flops,
        seconds=seconds,
        remarks=tuple(remarks),
    )


def update_flops(config: RunConfig, shape: ModelShape, tokens: int) -> dict[str, float]:
    """Of the learner: 2 for each number a token is multiplied with, 4 for each pair that attention looks at (half of
    them are later positions); twice that in the backward."""
    context = config.agent.max_context_tokens
    pairs = 4.0 * shape.layers * shape.heads * shape.head_width * context / 2
    forward = (2.0 * shape.multiplied + pairs) * tokens
    c = config.learner
    passes = 3.0 + (1.0 if c.activation_checkpointing else 0.0)
    old = config.algorithm.pi_old != "mu" and (config.rollout.max_lag > 0 or (shape.experts > 0 and c.router_loss > 0))
    return {"training": forward * passes * c.epochs, "pi_old": forward if old else 0.0}


def _seconds(
    config: RunConfig,
    shape: ModelShape,
    devices: Devices,
    flops: dict[str, float],
    sampled: int,
    engines: int,
    tp: int,
    running: int,
) -> dict[str, float]:
    device, count = devices.each, devices.count
    if not device.flops:
        return {}
    product = 2 if devices.kind == "cuda" or config.model.precision == "bfloat16" else 4
    compute, memory = device.flops * COMPUTE_SHARE, device.bandwidth * MEMORY_SHARE
    each = max(1, running // engines)
    # A step reads the weights that its tokens need: of the experts, those that any of them chose.
    used = 1.0 - (1.0 - shape.chosen / shape.experts) ** each if shape.experts else 0.0
    weights = product * (shape.parameters - shape.expert_parameters + used * shape.expert_parameters)
    cache = each * kv_bytes(shape, product) * config.agent.max_context_tokens / 2
    step = max((weights + cache) / (tp * memory), 2.0 * shape.multiplied * each / (tp * compute))
    prefill = max(0.0, flops["generation"] - 2.0 * shape.multiplied * sampled) / (count * compute)
    found = {
        "generation": sampled / (each * engines) * step + prefill,
        "training": (flops["training"] + flops["pi_old"]) / (count * compute),
    }
    if devices.kind == "cuda":
        tokens = config.rollout.group_size * config.rollout.groups_per_step * config.agent.max_context_tokens
        rounds = math.ceil(tokens / (count * micro_batch(config)))
        passes = 2 + (1 if flops["pi_old"] else 0)
        sent = (product * passes + MASTER) * shape.parameters
        found["gathering weights, summing gradients"] = rounds * config.learner.epochs * sent / LINK
        # Each rank writes its rows to the host, each engine reads its weights from there.
        found["new weights to the engines"] = (MASTER / count + product / tp) * shape.parameters / HOST_LINK
    return found
