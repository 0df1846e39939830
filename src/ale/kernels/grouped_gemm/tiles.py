"""Tile and path choice of `grouped_gemm`: pure functions of shape, dtype and device, so that they test without one.

The CPU's are measured (bench/results/kernels_grouped_gemm.json); the GPU's are checked ahead of time for spills, shared
memory and matrix instructions and have not yet run on a GPU.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ale.kernels.device import TMA_ALIGNMENT

CpuPath = Literal["grouped_mm", "loop", "upcast"]

BF16_LOOP_FLOPS = 1e8
"""With AMX, bf16 products above this many operations per expert go to one `mm` each, whose blocked kernels then win
over `grouped_mm` (1.8x); below it the calls themselves dominate. Without AMX `grouped_mm` wins, by up to 20%."""

SWIGLU_ROWS, SWIGLU_COLUMNS = 8, 256
"""Block of the elementwise backward of SwiGLU: 16 values a thread at 4 warps."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of a kernel. `m`, `n`, `k`: block sides; `group`: tiles per L2 strip."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True, slots=True)
class Processor:
    """What the path choice knows of a CPU: matrix units for half types, and whether the library has fp16 kernels."""

    amx: bool
    fp16: bool


def cpu_path(M: int, E: int, K: int, N: int, dtype: torch.dtype, processor: Processor) -> CpuPath:
    """How a CPU multiplies; the same for a product and, with K and N exchanged, for both of its gradients.

    `upcast` converts to fp32 on the way in, for fp16 where the library has no fp16 kernels.
    """
    if dtype is torch.float16 and not processor.fp16:
        return "upcast"
    if dtype is torch.float64 or (K * dtype.itemsize) % TMA_ALIGNMENT or (N * dtype.itemsize) % TMA_ALIGNMENT:
        return "loop"  # torch's grouped_mm takes neither
    if dtype is torch.bfloat16 and processor.amx and 2 * M / E * K * N >= BF16_LOOP_FLOPS:
        return "loop"
    return "grouped_mm"


def gemm_tile(
    M: int,
    E: int,
    N: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    aligned: bool = True,
    swiglu: bool = False,
    tf32: bool = False,
) -> Tile:
    """The tile of the forward product and of dX. `N` counts columns of the output.

    Operands that are not `aligned` (16 bytes) pass through registers element by element: a small tile leaves room.
    """
    rows = -(-M // E)
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    if dtype is torch.float32 and not tf32:
        # no matrix unit in exact fp32: the tile lives in registers
        m = min(m, 64)
        return Tile(m, 32 if swiglu else 64, 16, warps=8 if swiglu and m == 64 else 4, stages=2)
    if not aligned:
        return Tile(min(m, 64), 32 if swiglu else 64, 32, warps=4, stages=2)
    k = 32 if dtype is torch.float32 else 64
    n = 64 if swiglu or N <= 64 else 128  # swiglu has two accumulators
    if m < 128:
        return Tile(m, n, k, warps=4, stages=3)
    if capability[0] < 9:
        return Tile(m, n, 16 if dtype is torch.float32 else 64, warps=8, stages=3)
    if N > 128 and not swiglu and dtype is not torch.float32:
        return Tile(m, 256, k, warps=8, stages=3)
    return Tile(m, n, k, warps=8, stages=3 if dtype is torch.float32 else 4)


def weight_grad_tile(
    K: int, N: int, dtype: torch.dtype, capability: tuple[int, int], *, aligned: bool = True, tf32: bool = False
) -> Tile:
    """The tile of dW: `k` by `n` of the result, summed over `m` rows at a time."""
    if dtype is torch.float32 and not tf32:
        return Tile(16, 64, 64, warps=8, stages=2)
    if not aligned:
        return Tile(32, 64, 64, warps=4, stages=2)
    side = 64 if min(K, N) <= 64 else 128
    deep = 32 if dtype is torch.float32 else 64
    if capability[0] >= 9:
        return Tile(deep, side, side, warps=8 if side == 128 else 4, stages=3)
    return Tile(32, side, side, warps=8 if side == 128 else 4, stages=3)
