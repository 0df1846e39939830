"""How ragged work is laid out and cut: pure functions of offsets, on the CPU.

Axes: T action tokens, C chunks, N trajectories, U units (chunks, or tokens where a level is "token").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ragged:
    """The checked layout, on the CPU. A chunk that does not carry the loss counts as one without tokens."""

    chunk_offsets: Integers
    trajectory_offsets: Integers
    carry_C: Flags | None

    @property
    def C(self) -> int:
        return len(self.chunk_offsets) - 1

    @property
    def N(self) -> int:
        return len(self.trajectory_offsets) - 1

    @cached_property
    def lengths_C(self) -> Integers:
        return self.chunk_offsets[1:] - self.chunk_offsets[:-1]

    @cached_property
    def filled_C(self) -> Flags:
        return self.lengths_C > 0

    @cached_property
    def tokens_C(self) -> Integers:
        return self.lengths_C if self.carry_C is None else np.where(self.carry_C, self.lengths_C, 0)

    @cached_property
    def chunks_N(self) -> Integers:
        return self.trajectory_offsets[1:] - self.trajectory_offsets[:-1]

    def unit_offsets(self, per_token: bool) -> Integers:
        """Offsets of the trajectories over units."""
        return self.chunk_offsets[self.trajectory_offsets] if per_token else self.trajectory_offsets


class Rewards(NamedTuple):
    """Checked and on the CPU: what each trajectory and each chunk earned."""

    advantage_N: Floats
    outcome_N: Integers | None
    """The chunk, counted over the whole call, at which the advantage of a trajectory is given. None: its last."""
    intrinsic_C: Floats | None

    def per_chunk(self, ragged: Ragged) -> Floats:
        """fp64: r_k with the advantage of each trajectory added at its outcome chunk."""
        reward_C = np.zeros(ragged.C) if self.intrinsic_C is None else self.intrinsic_C.astype(np.float64)
        outcome_N = ragged.trajectory_offsets[1:] - 1 if self.outcome_N is None else self.outcome_N
        filled_N = ragged.chunks_N > 0
        reward_C[outcome_N[filled_N]] += self.advantage_N[filled_N]
        return reward_C


class Tile(NamedTuple):
    """`rows` pieces of at most `piece` tokens each are one step of a program of `warps` warps."""

    rows: int
    piece: int
    warps: int


# A sum is a tree of additions whose form follows from `piece`: were it to depend on the batch, so would the bits.
PIECE = 128
# Segments a program sums, and lanes that share one; units a program weighs; chunks of one step of the scan.
SEGMENT_ROWS, SEGMENT_LANES, UNITS, SCAN = 16, 32, 256, 128
# Programs for each multiprocessor: enough to hide the loads of one behind those of others.
PROGRAMS_PER_MULTIPROCESSOR = 8


def tile(accumulator_bytes: int) -> Tile:
    """2,048 tokens a step in fp32, 16 a thread: three arrays of them leave the occupancy whole. Half of it in fp64."""
    return Tile(rows=16 if accumulator_bytes == 4 else 8, piece=PIECE, warps=4)


def programs(pieces: int, rows: int, multiprocessors: int) -> int:
    """Persistent programs for so many pieces: at most what fills the device, at most one a tile, at least one."""
    return max(1, min(-(-pieces // rows), multiprocessors * PROGRAMS_PER_MULTIPROCESSOR))


def cut(ragged: Ragged) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Pieces [3, P] (chunk, first token, token after the last) and their offsets per chunk [C + 1]; int32, because they
    are read beside every 128 tokens. An empty chunk has no piece."""
    pieces_C = -(-ragged.lengths_C // PIECE)
    offsets = np.zeros(ragged.C + 1, np.int64)
    np.cumsum(pieces_C, out=offsets[1:])
    chunk_P = np.repeat(np.arange(ragged.C), pieces_C)
    start_P = ragged.chunk_offsets[chunk_P] + PIECE * (np.arange(len(chunk_P)) - offsets[chunk_P])
    stop_P = np.minimum(start_P + PIECE, ragged.chunk_offsets[chunk_P + 1])
    return np.stack([chunk_P, start_P, stop_P]).astype(np.int32), offsets.astype(np.int32)
