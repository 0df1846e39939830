"""Where a tensor is computed, the one place that the operations dispatch on, and what a launch needs to know of it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

TMA_ALIGNMENT = 16
"""Bytes that a descriptor's base address and outer strides must be a multiple of."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What the tile choice knows of a GPU."""

    capability: tuple[int, int]
    processors: int
    """Streaming multiprocessors: a persistent kernel starts a few programs on each."""


def chip_of(tensor: Tensor) -> Chip | None:
    """The GPU that holds `tensor`, or None for a CPU tensor. ValueError for any other device."""
    if tensor.device.type == "cpu":
        return None
    if tensor.device.type != "cuda":
        raise ValueError(f"expected a tensor on cpu or cuda, got one on {tensor.device}")
    properties = torch.cuda.get_device_properties(tensor.device)
    if properties.major < 8:
        raise ValueError(f"the kernels need compute capability 8.0 or newer, got {properties.major}.{properties.minor}")
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, on which Triton launches; does nothing for a CPU tensor."""
    manager: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return manager


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts matrix operands as autocast would, which does not see into the operations here."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype is torch.float64 else t.to(dtype) for t in tensors)


def wide(tensor: Tensor) -> torch.dtype:
    """The type that sums are kept in: fp32, and fp64 for fp64."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def is_aligned(tensor: Tensor) -> bool:
    """Whether rows can be moved 16 bytes at a time: last axis dense, base address and other strides multiples of 16."""
    if tensor.numel() == 0 or tensor.stride(-1) != 1 or tensor.data_ptr() % TMA_ALIGNMENT:
        return False
    return all(stride > 0 and stride * tensor.itemsize % TMA_ALIGNMENT == 0 for stride in tensor.stride()[:-1])


def takes_tma(tensor: Tensor, chip: Chip) -> bool:
    """Whether a kernel can read the tensor through a TMA descriptor, which sm_90 brought."""
    return chip.capability[0] >= 9 and is_aligned(tensor)


def multiplies_in_fp32(dtype: torch.dtype) -> bool:
    """Whether a kernel has to upcast before it multiplies: Triton's interpreter takes bf16 bits for integers."""
    import triton

    return bool(triton.knobs.runtime.interpret) and dtype is torch.bfloat16
