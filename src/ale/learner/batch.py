"""From trajectories to padded micro-batches.

Axes: N trajectories, B rows of a micro-batch, T padded positions, A action tokens (those the policy sampled, in order
of row, chunk and position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ale.messages import Chunk
from ale.wire import Array

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """`index` says which sequences of the batch these rows are, and `action_*` where the sampled tokens stand."""

    index: tuple[int, ...]
    ids_BT: Tensor
    real_BT: Tensor  # bool: not padding
    action_row_A: Tensor
    action_position_A: Tensor

    @property
    def action_ids_A(self) -> Tensor:
        return self.ids_BT[self.action_row_A, self.action_position_A]


def split(tokens_N: Sequence[Array], chunks_N: Sequence[tuple[Chunk, ...]], micro_tokens: int) -> list[MicroBatch]:
    """Micro-batches of at most `micro_tokens` padded tokens (or one sequence), of similar lengths each."""
    order = sorted(range(len(tokens_N)), key=lambda i: len(tokens_N[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(tokens_N[i]) <= micro_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_pad(tuple(group), tokens_N, chunks_N) for group in groups]


def _pad(index: tuple[int, ...], tokens_N: Sequence[Array], chunks_N: Sequence[tuple[Chunk, ...]]) -> MicroBatch:
    length = max(len(tokens_N[i]) for i in index)
    ids_BT = np.zeros((len(index), length), np.int64)
    real_BT = np.zeros((len(index), length), bool)
    rows: list[Positions] = []
    positions: list[Positions] = []
    for row, i in enumerate(index):
        tokens = tokens_N[i].numpy()
        ids_BT[row, : len(tokens)] = tokens
        real_BT[row, : len(tokens)] = True
        for chunk in chunks_N[i]:
            if not 0 < chunk.start <= chunk.end <= len(tokens):
                raise ValueError(
                    f"chunk {chunk.start}..{chunk.end}: expected to lie in 1..{len(tokens)} (the first token of a "
                    "sequence cannot be an action: nothing predicts it)"
                )
            positions.append(np.arange(chunk.start, chunk.end))
            rows.append(np.full(chunk.end - chunk.start, row))
    empty = [np.zeros(0, np.int64)]
    return MicroBatch(
        index=index,
        ids_BT=torch.from_numpy(ids_BT),
        real_BT=torch.from_numpy(real_BT),
        action_row_A=torch.from_numpy(np.concatenate(rows or empty)),
        action_position_A=torch.from_numpy(np.concatenate(positions or empty)),
    )
