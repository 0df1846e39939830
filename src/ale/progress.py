"""What a run says about itself: `Progress` while it goes on, `Summary` (`summary.json`) when it is done."""

from __future__ import annotations

from typing import Literal

import msgspec

Phase = Literal["warm_start", "evaluate", "train", "resume"]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """`Progress(phase="train", step=12, total=100, values={"success": 0.61}, waits=("trainer: a batch (3 s)",))`.

    Told at each step, and every second in between. `waits` names what the run is waiting for right now, so that a run
    that stands still says why.
    """

    phase: Phase
    step: int
    total: int
    values: dict[str, float] = {}
    waits: tuple[str, ...] = ()


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """`Rate(success=0.74, ci95=(0.67, 0.8), n=200)`: the share of tasks solved, with its 95% interval."""

    success: float
    ci95: tuple[float, float]
    n: int


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """`Versions(python="3.11.2", torch="2.13.0", transformers="5.20.0", ale="0.1.0", commit="cf83620")`."""

    python: str
    torch: str
    transformers: str
    ale: str
    commit: str | None = None
    """Of the checkout that ran; None outside a git checkout."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One training run: the content of `summary.json`. A rate is None where there were no such tasks to evaluate."""

    name: str
    seed: int
    updates: int
    heldout_before: Rate | None
    heldout_after: Rate | None
    heldout_families_before: Rate | None
    heldout_families_after: Rate | None
    wall_s: float
    """Of all the lives of a run that was resumed; so are the episodes and all that follows."""
    episodes: int
    tokens_per_s: float
    """Action tokens trained on, over the time that the trainer waited for batches and made updates."""
    max_lag_seen: int
    max_lag_allowed: int
    lost_samples: int
    """Samples started that were neither trained on, buffered, running nor dropped with a reason: always 0."""
    dropped_by_reason: dict[str, int]
    lives: int = 1
    """How often it was started: 1 where it was never resumed."""
    restarted: int = 0
    """Rollouts that were cut off by the end of a life and ran again from their start in the next."""
    versions: Versions


class EvalSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation of a model; the families are None where the tasks have no unseen ones."""

    name: str
    seed: int
    model: str
    heldout: Rate
    heldout_families: Rate | None
    wall_s: float
    versions: Versions
