"""Why something is not trained on: pure decisions with a named reason, None where nothing is wrong.

A rejected rollout is replaced by a new one from the same start state, so a batch never comes up short; the reason is
counted and reported (arXiv 2512.24873, section 3.1.3, dynamic filtering).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ale.config import Baseline

from .advantages import advantages, needs_group


class Reason(StrEnum):
    """Why a rollout, a trajectory or a group was dropped. The text is the metric's name."""

    SANDBOX_FAILURE = "sandbox_failure"
    POLICY_FAILURE = "policy_failure"
    EVALUATOR_ERROR = "evaluator_error"
    UNREPEATABLE_TOOL = "unrepeatable_tool"
    ILLEGAL_TOOL_CALLS = "illegal_tool_calls"
    REWARD_NOT_FINITE = "reward_not_finite"
    LOGP_NOT_FINITE = "logp_not_finite"
    STALE = "stale"
    REDUNDANT = "redundant"
    STRAGGLER = "straggler"
    ZERO_ADVANTAGE = "zero_advantage"
    GROUP_TOO_SMALL = "group_too_small"


def rollout_reason(
    *,
    reward: float | None,
    sandbox_failed: bool = False,
    policy_failed: bool = False,
    evaluator_failed: bool = False,
    unrepeatable_tool: bool = False,
    illegal_tool_calls: int = 0,
    max_illegal_tool_calls: int | None = None,
) -> Reason | None:
    """Why the reward of a rollout cannot be trusted. The cause comes before its consequence: a rollout whose sandbox
    died has no reward either, and is reported as a sandbox failure.

    policy_failed            a transient failure of the engine or API that generates
    evaluator_failed         the tests crashed or timed out themselves; tests that ran and failed are a reward
    unrepeatable_tool        replaying a tool call gave another response
    max_illegal_tool_calls   the most calls that name no tool or break its schema; None: any number
    """
    if sandbox_failed:
        return Reason.SANDBOX_FAILURE
    if policy_failed:
        return Reason.POLICY_FAILURE
    if evaluator_failed:
        return Reason.EVALUATOR_ERROR
    if unrepeatable_tool:
        return Reason.UNREPEATABLE_TOOL
    if max_illegal_tool_calls is not None and illegal_tool_calls > max_illegal_tool_calls:
        return Reason.ILLEGAL_TOOL_CALLS
    if reward is None or not math.isfinite(reward):
        return Reason.REWARD_NOT_FINITE
    return None


def logp_reason(logp_T: npt.ArrayLike | None, logp_old_T: npt.ArrayLike, logp_mu_T: npt.ArrayLike) -> Reason | None:
    """Why the log-probabilities of a trajectory's action tokens cannot be trained on.

    `pi` and `pi_old` must be finite. `mu` may be -inf (the sampler's truncation: such a chunk is masked, not dropped),
    but NaN and +inf are a broken recording. `logp_T` is None before the update has computed it.
    """
    for values in (logp_T, logp_old_T):
        if values is not None and not np.isfinite(np.asarray(values)).all():
            return Reason.LOGP_NOT_FINITE
    mu = np.asarray(logp_mu_T)
    return Reason.LOGP_NOT_FINITE if (np.isnan(mu) | np.isposinf(mu)).any() else None


def stale_reason(training_version: int, oldest_version: int, max_lag: int) -> Reason | None:
    """`training_version` is the version being trained when the batch is taken, `oldest_version` the oldest policy that
    sampled any token of the trajectory; their distance may be at most `max_lag` (the report's asynchronous ratio).
    ValueError if the sample comes from the future: its version was recorded wrongly."""
    lag = training_version - oldest_version
    if lag < 0:
        raise ValueError(
            f"oldest_version: expected at most the version trained, {training_version}, got {oldest_version}"
        )
    return Reason.STALE if lag > max_lag else None


def group_reason(rewards_G: Sequence[float], baseline: Baseline) -> Reason | None:
    """Why a group gives no gradient: too few members are left to compare, or every advantage is 0. Rewards are finite:
    what has none was dropped before."""
    if len(rewards_G) < (2 if needs_group(baseline) else 1):
        return Reason.GROUP_TOO_SMALL
    return None if advantages(rewards_G, baseline).any() else Reason.ZERO_ADVANTAGE
