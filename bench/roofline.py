"""What the device can do at most, measured: bytes a second of a copy, operations a second of one large product.

A call that makes `flops` operations and moves `moved` bytes cannot take less than the longer of the two at these rates;
that least time over the time it takes is its share of the roofline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from bench.measure import DEVICE, milliseconds

COPIED = 2**26 if DEVICE.type == "cpu" else 2**30
"""fp32 values of the copy (STREAM's): twice this many times 4 bytes are moved, far more than any cache holds."""
SIDE = 2048 if DEVICE.type == "cpu" else 8192


@dataclass(frozen=True)
class Peak:
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """What one call has to do at the least."""

    flops: float
    moved: float
    dtype: torch.dtype

    def figures(self, ms: float) -> tuple[float, float, float]:
        """GFLOP/s, GB/s and the share of the roofline of a call that took so long."""
        peak = Peak(copy_rate(), product_rate(self.dtype))
        least_s = max(self.flops / peak.flops_per_s, self.moved / peak.bytes_per_s)
        return self.flops / ms / 1e6, self.moved / ms / 1e6, least_s * 1e3 / ms


@cache
def copy_rate() -> float:
    source = torch.ones(COPIED, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / milliseconds(lambda: target.copy_(source), budget_s=1.0) * 1e3


@cache
def product_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / milliseconds(lambda: a @ b, budget_s=1.0) * 1e3


def forget() -> None:
    """The rates belong to a number of threads: call after changing it."""
    copy_rate.cache_clear()
    product_rate.cache_clear()
