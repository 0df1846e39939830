"""Which tokens belong to which chunk of which trajectory: the ragged layout of a batch, without padding.

Axes: T action tokens (nothing else is in the arrays of a batch), C chunks, N trajectories.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Segments:
    """One trajectory as the loss sees it.

    chunk_lengths   action tokens of each chunk, in order; 0 for a chunk without any
    advantage       what plays R_final
    carry           which chunks carry the loss; None: all. Prefilled chunks and turns masked as errors do not
    rewards         intrinsic reward of each chunk; None: 0
    outcome         index of the outcome-determining chunk; None: the last

    >>> Segments(chunk_lengths=(12, 40, 7), advantage=0.75, carry=(False, True, True))
    """

    chunk_lengths: tuple[int, ...]
    advantage: float
    carry: tuple[bool, ...] | None = None
    rewards: tuple[float, ...] | None = None
    outcome: int | None = None

    def __post_init__(self) -> None:
        chunks = len(self.chunk_lengths)
        if any(length < 0 for length in self.chunk_lengths):
            raise ValueError(f"chunk_lengths: expected lengths >= 0, got {self.chunk_lengths}")
        for name, values in (("carry", self.carry), ("rewards", self.rewards)):
            if values is not None and len(values) != chunks:
                raise ValueError(f"{name}: expected one value for each of the {chunks} chunks, got {len(values)}")
        if self.outcome is not None and not 0 <= self.outcome < chunks:
            raise ValueError(f"outcome: expected a chunk in 0..{chunks - 1}, got {self.outcome}")
        numbers = (self.advantage, *(self.rewards or ()))
        if not np.isfinite(numbers).all():
            raise ValueError(f"advantage, rewards: expected finite numbers, got {numbers}")

    @property
    def tokens(self) -> int:
        return sum(self.chunk_lengths)


@dataclass(frozen=True)
class Layout:
    """The layout of a batch or micro-batch: offsets and what each chunk and trajectory carries, as numpy arrays.

    chunk_offsets [C+1] runs over tokens, trajectory_offsets [N+1] over chunks. A trajectory is never split: its chunks
    share a return.
    """

    chunk_offsets: npt.NDArray[np.int64]
    trajectory_offsets: npt.NDArray[np.int64]
    advantage_N: npt.NDArray[np.float64]
    outcome_N: npt.NDArray[np.int64]
    carry_C: npt.NDArray[np.bool_] | None = None
    rewards_C: npt.NDArray[np.float64] | None = None

    @classmethod
    def of(cls, trajectories: Sequence[Segments]) -> Layout:
        """Lays trajectories end to end. `carry_C` and `rewards_C` stay None where no trajectory names them."""
        carry_C = rewards_C = None
        if any(s.carry is not None for s in trajectories):
            carry = (s.carry or (True,) * len(s.chunk_lengths) for s in trajectories)
            carry_C = np.fromiter(chain.from_iterable(carry), dtype=np.bool_)
        if any(s.rewards is not None for s in trajectories):
            rewards = (s.rewards or (0.0,) * len(s.chunk_lengths) for s in trajectories)
            rewards_C = np.fromiter(chain.from_iterable(rewards), dtype=np.float64)
        outcomes = (len(s.chunk_lengths) - 1 if s.outcome is None else s.outcome for s in trajectories)
        return cls(
            chunk_offsets=_offsets(chain.from_iterable(s.chunk_lengths for s in trajectories)),
            trajectory_offsets=_offsets(len(s.chunk_lengths) for s in trajectories),
            advantage_N=np.array([s.advantage for s in trajectories], dtype=np.float64),
            outcome_N=np.fromiter(outcomes, dtype=np.int64),
            carry_C=carry_C,
            rewards_C=rewards_C,
        )

    @property
    def tokens(self) -> int:
        return int(self.chunk_offsets[-1])

    @property
    def chunks(self) -> int:
        return len(self.chunk_offsets) - 1

    @property
    def trajectories(self) -> int:
        return len(self.trajectory_offsets) - 1


def chunk_lengths(action_mask: npt.ArrayLike, boundaries: Sequence[int]) -> tuple[int, ...]:
    """Action tokens of each chunk of one token sequence: chunk k is what `action_mask` selects in
    boundaries[k]..boundaries[k+1]; the boundaries run from 0 to the length of the sequence.

    >>> chunk_lengths([0, 0, 1, 1, 0, 1, 0], [0, 4, 7])
    (2, 1)
    """
    mask = np.asarray(action_mask, dtype=np.bool_)
    edges = np.asarray(boundaries, dtype=np.int64)
    if mask.ndim != 1 or len(edges) < 1 or edges[0] != 0 or edges[-1] != len(mask) or (np.diff(edges) < 0).any():
        raise ValueError(
            f"boundaries: expected a rise from 0 to the {mask.size} tokens of one sequence, got {boundaries}"
        )
    before = np.concatenate([[0], np.cumsum(mask)])
    return tuple(np.diff(before[edges]).tolist())


def _offsets(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(accumulate(lengths, initial=0), dtype=np.int64)
