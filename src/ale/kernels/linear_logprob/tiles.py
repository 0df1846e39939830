"""Block choice of `linear_logprob`: pure functions of shape, dtype and device, so that they test without one.

The GPU tiles are checked ahead of time for spills, shared memory and matrix instructions and have not yet run on a GPU.
"""

from dataclasses import dataclass

import torch

CPU_TOKENS, CPU_VOCABULARY = 2048, 1024
"""Sides of the block of logits on a CPU: 8 MiB in fp32. Blocks from 0.5 to 4 Mi elements are as fast, within 5%; larger
ones spill the last-level cache, and with fewer tokens the weight is read more often."""

CHUNKS = 32
"""The backward on a GPU holds one of this many slices of the vocabulary's gradient at a time."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of a kernel: `m` tokens by `n` words of the vocabulary, `k` hidden at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    """Tiles of tokens that share their columns of the weight while these are in L2."""


def sums_tile(T: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile of the forward, whose running sums want registers beside the product."""
    if dtype is torch.float32:
        return Tile(32 if T <= 32 else 64, 64, 16, warps=4, stages=2)
    if T <= 64:
        return Tile(16 if T <= 16 else 32 if T <= 32 else 64, 128, 64, warps=8 if T > 32 else 4, stages=3)
    return Tile(128, 128, 64, warps=8, stages=4 if capability[0] >= 9 else 3)


def grad_tile(T: int, dtype: torch.dtype, capability: tuple[int, int], *, tma: bool) -> Tile:
    """The tile of the backward's kernel."""
    if tma and T > 64 and dtype is not torch.float32:
        return Tile(128, 256, 64, warps=8, stages=3)
    return sums_tile(T, dtype, capability)


def slices(T: int, V: int, tile: Tile, processors: int) -> tuple[int, int]:
    """Slices of the vocabulary that run beside each other in the forward, and tiles in each: two waves of programs."""
    token_tiles, word_tiles = -(-T // tile.m), -(-V // tile.n)
    wanted = max(1, min(word_tiles, 2 * processors // max(1, token_tiles)))
    per_slice = -(-word_tiles // wanted)
    return -(-word_tiles // per_slice), per_slice


def chunk(V: int) -> int:
    """Words of the vocabulary whose gradient is held at once by the backward on a GPU."""
    return max(1024, -(-V // (CHUNKS * 256)) * 256)
