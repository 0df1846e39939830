"""How ragged work is laid out and cut: pure functions of offsets, on the CPU.

Axes: T action tokens, C chunks, N trajectories, U units (chunks, or tokens where a level is "token").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
        return np.diff(self.chunk_offsets)

    @cached_property
    def tokens_C(self) -> Integers:
        return self.lengths_C if self.carry_C is None else np.where(self.carry_C, self.lengths_C, 0)

    @cached_property
    def chunks_N(self) -> Integers:
        return np.diff(self.trajectory_offsets)

    def unit_offsets(self, per_token: bool) -> Integers:
        """Offsets of the trajectories over units."""
        return self.chunk_offsets[self.trajectory_offsets] if per_token else self.trajectory_offsets
