"""Chunk-level initialised resampling (arXiv 2512.24873, 3.2.4): rollouts that start inside an expert trajectory.

An expert trajectory of K chunks gives K start states: anchor k is the state after chunk k-1, chunks 0..k-1 prefilled.
Anchor 0 is the task's own beginning. Everything here is bookkeeping on frozen values; who restores the environment and
who samples is not its business.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class Tally:
    """Successes among rollouts from one anchor."""

    successes: int = 0
    rollouts: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.rollouts:
            raise ValueError(f"Tally: expected 0 <= successes <= rollouts, got {self.successes} of {self.rollouts}")

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.successes + other.successes, self.rollouts + other.rollouts)

    @property
    def rate(self) -> float:
        return self.successes / self.rollouts if self.rollouts else 0.0


@dataclass(frozen=True)
class Expert:
    """A successful trajectory to start from: an oracle's, a teacher's, or the policy's own. `version` is the policy
    version that finished it, None for one that no policy of this run sampled."""

    trajectory: str
    chunks: int
    version: int | None = None

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError(f"Expert: expected at least one chunk, got {self.chunks}")


def refresh(expert: Expert, candidate: Expert) -> Expert:
    """The expert to go on with after a success of the current policy: the newer version, of equals the shorter one. A
    trajectory the policy sampled itself is nearer to what it can do than an oracle's."""
    newer = -1 if expert.version is None else expert.version
    offered = -1 if candidate.version is None else candidate.version
    return candidate if (offered, -candidate.chunks) > (newer, -expert.chunks) else expert


# --- sequential rollback ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollback:
    """Sequential rollback: rollouts start at the last chunk, and move one chunk towards the first whenever the success
    rate over a window of at least `min_rollouts` from this anchor reaches `threshold`. A window that fails gives way to
    a new one: the failures of a policy long gone must not hold back the one in training.

    tally    of the window now filling
    failed   of the last full window at this anchor, empty before the first
    passed   of the window that let the anchor before this one go, one chunk later in the trajectory

    >>> Rollback.begin(Expert("oracle", chunks=42)).anchor
    41
    """

    expert: Expert
    anchor: int
    tally: Tally = Tally()
    failed: Tally = Tally()
    passed: Tally = Tally()
    threshold: float = 0.5
    min_rollouts: int = 8
    finished: bool = False

    @classmethod
    def begin(cls, expert: Expert, *, threshold: float = 0.5, min_rollouts: int = 8) -> Rollback:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a success rate in (0, 1], got {threshold}")
        if min_rollouts < 1:
            raise ValueError(f"min_rollouts: expected at least 1, got {min_rollouts}")
        return cls(expert, expert.chunks - 1, threshold=threshold, min_rollouts=min_rollouts)

    def record(self, anchor: int, outcome: Tally) -> Rollback:
        """The state after `outcome` of rollouts that started at `anchor`. Stragglers from an anchor left behind change
        nothing. At anchor 0 a passed threshold finishes: the task is solved from its own beginning."""
        if anchor != self.anchor or self.finished:
            return self
        tally = self.tally + outcome
        if tally.rollouts < self.min_rollouts:
            return replace(self, tally=tally)
        if tally.rate < self.threshold:
            return replace(self, tally=Tally(), failed=tally)
        if self.anchor == 0:
            return replace(self, tally=tally, finished=True)
        return replace(self, anchor=self.anchor - 1, tally=Tally(), failed=Tally(), passed=tally)

    def crucial_chunk(self, *, alpha: float = 0.05) -> int | None:
        """The chunk to be resampled at this anchor if it is crucial: the last full window before it did significantly
        worse than the window after it did."""
        return self.anchor if is_crucial(self.failed, self.passed, alpha=alpha) else None

    def refreshed(self, candidate: Expert, shared_chunks: int) -> Rollback:
        """The state after a current success replaced the expert, if it is to (`refresh`). `shared_chunks` is how many
        of its first chunks are the old expert's: rollouts go on from the same state only if the prefix reaches the
        anchor, so a candidate that left it earlier is not taken."""
        chosen = refresh(self.expert, candidate)
        if chosen is self.expert or shared_chunks < self.anchor or candidate.chunks <= self.anchor:
            return self
        return replace(self, expert=candidate)


# --- parallelised initialisation --------------------------------------------------------------------------------------


def uniform_anchors(chunks: int, count: int) -> tuple[int, ...]:
    """`count` anchors (all, if there are fewer) spread evenly over 0..chunks-1, both ends among them from two on.

    >>> uniform_anchors(10, 4)
    (0, 3, 6, 9)
    """
    _check_anchors(chunks, count)
    if count >= chunks:
        return tuple(range(chunks))
    if count == 1:
        return (0,)
    return tuple(round(i * (chunks - 1) / (count - 1)) for i in range(count))


def random_anchors(chunks: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` distinct anchors (all, if there are fewer) of 0..chunks-1, in order; the same for the same seed."""
    _check_anchors(chunks, count)
    return tuple(sorted(random.Random(seed).sample(range(chunks), min(count, chunks))))


def _check_anchors(chunks: int, count: int) -> None:
    if chunks < 1 or count < 1:
        raise ValueError(f"anchors: expected at least one chunk and one anchor, got chunks={chunks}, count={count}")


# --- crucial chunks ---------------------------------------------------------------------------------------------------


def fisher_p(before: Tally, after: Tally) -> float:
    """One-sided p-value of Fisher's exact test: the chance of at most `before.successes` successes before, given all
    the margins, if the two success rates were equal. 1 where either side has no rollouts.

    Exact because rollouts per anchor are few (4 to 64), where the normal approximation is wrong at rates near 0 and 1,
    and those are the ones that occur. Integers throughout; no statistics package.
    """
    total, successes = before.rollouts + after.rollouts, before.successes + after.successes
    fewest = max(0, successes - after.rollouts)
    ways = sum(
        math.comb(before.rollouts, k) * math.comb(after.rollouts, successes - k)
        for k in range(fewest, before.successes + 1)
    )
    return ways / math.comb(total, successes)


def is_crucial(before: Tally, after: Tally, *, alpha: float = 0.05) -> bool:
    """Whether success from the prefix before a chunk is significantly below success from the prefix after it."""
    return fisher_p(before, after) < alpha


def crucial_chunks(tallies: Mapping[int, Tally], *, alpha: float = 0.05) -> tuple[int, ...]:
    """Crucial chunks of one expert trajectory, from tallies by anchor, in order.

    Neighbouring anchors a < b are compared; where they differ, the crucial chunk is f = b - 1, the last one that anchor
    b has and anchor a lacks (with b = a + 1 the only one). `alpha` is shared over the comparisons (Bonferroni), so
    that a long trajectory does not grow crucial chunks by chance.
    """
    anchors = sorted(tallies)
    pairs = list(pairwise(anchors))
    return tuple(b - 1 for a, b in pairs if is_crucial(tallies[a], tallies[b], alpha=alpha / len(pairs)))


# --- which chunks carry which loss ------------------------------------------------------------------------------------


def rl_carry(chunks: int, anchor: int) -> tuple[bool, ...]:
    """Chunks of a rollout from `anchor` that carry the chunk policy gradient: those it sampled, not the prefilled."""
    return tuple(k >= anchor for k in range(chunks))


def il_carry(chunks: int, fork: int, at_fork: Tally) -> tuple[bool, ...]:
    """Chunks of the expert trajectory that carry the imitation loss: those up to and including the crucial chunk `fork`
    if none of the rollouts before it (`at_fork`, from anchor = fork) succeeded, else none. It is carried once, by
    the expert trajectory itself, not by each rollout that was prefilled with it."""
    if not 0 <= fork < chunks:
        raise ValueError(f"fork: expected a chunk in 0..{chunks - 1}, got {fork}")
    hopeless = at_fork.rollouts > 0 and at_fork.successes == 0
    return tuple(hopeless and k <= fork for k in range(chunks))
