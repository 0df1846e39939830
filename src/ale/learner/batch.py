"""From trajectories to micro-batches, in which a group's prompt stands once.

Axes: N sequences, B rows of a micro-batch, T positions of a row, A action tokens (those the policy sampled, in order of
sequence, chunk and position). A row is a prompt followed by the sequences that continue it: each sees the prompt and
itself, at the positions it would have alone, so that every number is that of the sequence by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ale.kernels.routing_replay import NOT_RECORDED
from ale.messages import Chunk
from ale.wire import Array

OVERHEAD = 256
"""What a micro-batch costs besides its tokens, in tokens (docs/learner.md)."""

Ints = npt.NDArray[np.int64]
Experts = npt.NDArray[np.int16]


@dataclass(frozen=True)
class MicroBatch:
    """`index` says which sequences of the batch these are, in the order of their action tokens.

    Places are positions of the flattened rows, `row * T + position`.
    """

    index: tuple[int, ...]
    ids_BT: Tensor
    position_BT: Tensor | None
    """None: every row is one sequence from position 0 on, padded at its end, which causal attention never sees."""
    sees_BTT: Tensor | None
    """bool, where `position_BT` is given: which positions of its row (last axis) each position attends to."""
    action_ids_A: Tensor
    before_A: Tensor
    """Place of the token before each action token: the action is predicted there."""
    sequence_A: Tensor
    """Which of `index` each action token belongs to."""
    places_N: tuple[Tensor, ...]
    """The places of every token of each sequence, its prompt included."""
    experts_LBTJ: Tensor | None = None
    """int16: the experts recorded while sampling, -1 where there is no record; None where there is none at all."""

    @property
    def tokens(self) -> int:
        """Of all sequences, prompts counted for each."""
        return sum(len(places) for places in self.places_N)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, places_N=tuple(places.to(device) for places in self.places_N), **moved)


def split(
    tokens_N: Sequence[Array],
    chunks_N: Sequence[tuple[Chunk, ...]],
    micro_tokens: int,
    *,
    width: int | None = None,
    overhead: int = OVERHEAD,
    experts_N: Sequence[Array | None] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of at most `micro_tokens` padded tokens (or one row), of similar lengths each.

    Rows are cut into micro-batches so that what padding costs, and `overhead` tokens for each micro-batch, is least.
    `width` is the model's hidden size, which decides when sharing a prompt pays; None: no prompt is shared.
    `experts_N` are the recorded experts [T, L, J] of the first T tokens of each sequence. Sequences whose records of a
    prompt differ do not share it.
    """
    tokens = [array.numpy().astype(np.int64) for array in tokens_N]
    experts = [None if e is None else e.numpy().astype(np.int16) for e in experts_N or [None] * len(tokens)]
    rows = [_Row(len(prompt), members) for prompt, members in _by_prompt(tokens, chunks_N, experts)]
    rows = [part for row in rows for part in row.parts([len(t) for t in tokens], width, micro_tokens)]
    rows.sort(key=lambda row: row.length)
    groups = _cut(rows, micro_tokens, overhead)
    return [_pack(group, tokens, chunks_N, experts) for group in groups]


def _cut(rows: list[_Row], micro_tokens: int, overhead: int) -> list[list[_Row]]:
    """Runs of rows (sorted by length, so the last is the longest) of the least cost in all."""
    cost, begins = [0], [0]
    for end, last in enumerate(rows, start=1):
        choices = []
        for begin in range(end - 1, -1, -1):
            cells = (end - begin) * last.length
            if begin < end - 1 and cells > micro_tokens:
                break
            choices.append((cost[begin] + cells + overhead, begin))
        best, begin = min(choices)
        cost.append(best)
        begins.append(begin)
    groups, end = list[list[_Row]](), len(rows)
    while end:
        groups.append(rows[begins[end] : end])
        end = begins[end]
    return groups[::-1]


@dataclass
class _Row:
    prompt: int
    members: list[int]
    length: int = 0

    def parts(self, lengths_N: list[int], width: int | None, micro_tokens: int) -> list[_Row]:
        """This row, cut where one more member would cost more than a row of its own.

        A transformer layer of width D spends about 24 D^2 on a token and 4 D on a pair of tokens. A member with r
        tokens of its own, added to a row of length L, saves the p tokens of the prompt and pays for the pairs that the
        mask hides: it belongs there while 2 r (L - p) <= p (6 D + p).
        """
        p = self.prompt
        rows: list[_Row] = []
        for member in self.members:
            r = lengths_N[member] - p
            for row in rows if width is not None else ():
                if 2 * r * (row.length - p) <= p * (6 * (width or 0) + p) and row.length + r <= micro_tokens:
                    row.members.append(member)
                    row.length += r
                    break
            else:
                rows.append(_Row(p, [member], p + r))
        return rows


def _by_prompt(
    tokens: list[Ints], chunks_N: Sequence[tuple[Chunk, ...]], experts: list[Experts | None]
) -> list[tuple[Ints, list[int]]]:
    """Sequences with the same tokens (and experts) before their first action, in the order of the first of them."""
    found: dict[tuple[bytes, bytes], tuple[Ints, list[int]]] = {}
    for i, (ids, chunks) in enumerate(zip(tokens, chunks_N, strict=True)):
        for chunk in chunks:
            if not 0 < chunk.start <= chunk.end <= len(ids):
                raise ValueError(
                    f"chunk {chunk.start}..{chunk.end}: expected to lie in 1..{len(ids)} (the first token of a "
                    "sequence cannot be an action: nothing predicts it)"
                )
        prompt = ids[: min((chunk.start for chunk in chunks), default=len(ids))]
        routes = experts[i]
        key = (prompt.tobytes(), b"" if routes is None else routes[: len(prompt)].tobytes())
        found.setdefault(key, (prompt, []))[1].append(i)
    return list(found.values())


def _pack(
    rows: list[_Row], tokens: list[Ints], chunks_N: Sequence[tuple[Chunk, ...]], experts: list[Experts | None]
) -> MicroBatch:
    length = max(row.length for row in rows)
    ids_BT = np.zeros((len(rows), length), np.int64)
    position_BT = np.tile(np.arange(length), (len(rows), 1))
    owner_BT = np.zeros((len(rows), length), np.int64)  # 0: the prompt; then the members of the row from 1 on
    index, places_N = list[int](), list[Ints]()
    before, ids, sequence = list[Ints](), list[Ints](), list[Ints]()
    for b, row in enumerate(rows):
        at = row.prompt
        for number, i in enumerate(row.members, 1):
            own = len(tokens[i]) - row.prompt
            ids_BT[b, : row.prompt] = tokens[i][: row.prompt]
            ids_BT[b, at : at + own] = tokens[i][row.prompt :]
            position_BT[b, at : at + own] = np.arange(row.prompt, row.prompt + own)
            owner_BT[b, at : at + own] = number
            places = b * length + np.concatenate([np.arange(row.prompt), np.arange(at, at + own)])
            for chunk in chunks_N[i]:
                before.append(places[chunk.start - 1 : chunk.end - 1])
                ids.append(tokens[i][chunk.start : chunk.end])
                sequence.append(np.full(chunk.end - chunk.start, len(index)))
            index.append(i)
            places_N.append(places)
            at += own
        owner_BT[b, at:] = len(row.members)  # padding continues the last member, which does not see it
        position_BT[b, at:] = position_BT[b, at - 1]
    shared = any(len(row.members) > 1 for row in rows)
    return MicroBatch(
        index=tuple(index),
        ids_BT=torch.from_numpy(ids_BT),
        position_BT=torch.from_numpy(position_BT) if shared else None,
        sees_BTT=_sees(torch.from_numpy(owner_BT)) if shared else None,
        action_ids_A=_join(ids),
        before_A=_join(before),
        sequence_A=_join(sequence),
        places_N=tuple(torch.from_numpy(places) for places in places_N),
        experts_LBTJ=_place_experts([experts[i] for i in index], places_N, len(rows), length),
    )


def _place_experts(experts_N: list[Experts | None], places_N: list[Ints], B: int, T: int) -> Tensor | None:
    recorded = [(experts, places) for experts, places in zip(experts_N, places_N, strict=True) if experts is not None]
    if not recorded:
        return None
    table = np.full((B * T, *recorded[0][0].shape[1:]), NOT_RECORDED, np.int16)
    for experts, places in recorded:
        table[places[: len(experts)]] = experts
    return torch.from_numpy(table.reshape(B, T, *table.shape[1:])).permute(2, 0, 1, 3)


def _sees(owner_BT: Tensor) -> Tensor:
    """Earlier positions of the prompt and of the same member."""
    key_B1T = owner_BT[:, None, :]
    causal_TT = torch.ones(owner_BT.shape[1], owner_BT.shape[1], dtype=torch.bool).tril()
    return ((key_B1T == 0) | (key_B1T == owner_BT[:, :, None])) & causal_TT


def _join(parts: list[Ints]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64))
