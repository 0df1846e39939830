"""From the record of an episode to what is trained on: a sequence for every branch, the loss on sampled tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ale.messages import Chunk, Rollout, Status, Trajectory
from ale.proxy.tree import Branch, Node, TokenTree
from ale.wire import Array


def trajectory(
    tree: TokenTree,
    rollout: Rollout,
    *,
    reward: float | None,
    status: Status,
    cause: str | None,
    started_version: int,
    duration_s: float,
) -> Trajectory:
    """One episode. Its longest branch is the trajectory itself, the others are its `branches`, and share its reward.

    Every turn is a chunk of exactly one of them: where branches share a turn, it is context to all but its owner.
    """
    whole = Trajectory(
        id=rollout.id,
        group=rollout.group,
        task=rollout.task.id,
        family=rollout.task.family,
        level=rollout.task.level,
        **_arrays([], frozenset()),
        reward=reward,
        status=status,
        cause=cause,
        started_version=started_version,
        duration_s=duration_s,
    )
    branches = sorted(tree.branches(), key=lambda b: -sum(len(node.sampled) for node in b.owned))
    sequences = [
        msgspec.structs.replace(
            whole, **_arrays(branch.nodes, branch.owned), id=rollout.id if not i else f"{rollout.id}#{i}"
        )
        for i, branch in enumerate(branches)
    ]
    if not sequences:
        return whole
    return msgspec.structs.replace(sequences[0], branches=tuple(sequences[1:]), answer=_answer(branches[0]))


def _arrays(nodes: Sequence[Node], owned: frozenset[Node]) -> dict[str, Any]:
    tokens: list[npt.NDArray[Any]] = []
    chunks: list[Chunk] = []
    length = 0
    for node in nodes:
        start = length + len(node.fresh_P)
        length = start + len(node.sampled)
        tokens += (node.fresh_P, node.sampled.tokens_A)
        if node in owned:
            chunks.append(Chunk(start, length, node.ending, error=node.ending in ("malformed", "cut")))
    sampled = [node.sampled for node in nodes if node in owned]
    return {
        "tokens_T": _joined(tokens, "int32"),
        "chunks": tuple(chunks),
        "logp_A": _joined([s.logp_A for s in sampled], "float32"),
        "logp_sampled_A": _joined([s.logp_sampled_A for s in sampled], "float32"),
        "version_A": _joined([s.version_A for s in sampled], "int32"),
    }


def _answer(branch: Branch) -> str | None:
    last = branch.nodes[-1]
    return last.said.text if last.ending == "answer" else None


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: str) -> Array:
    return Array.of(np.concatenate(parts) if parts else [], dtype)
