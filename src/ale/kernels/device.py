"""Where a tensor is computed: the one place that the kernels dispatch on."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts matrix operands as autocast would, which does not see into the operations here."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype is torch.float64 else t.to(dtype) for t in tensors)
