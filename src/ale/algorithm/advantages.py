"""From the rewards of a group to what plays R_final of each of its trajectories (arXiv 2512.24873, eq. 7).

A group (axis G) is the rollouts of one task from one start state. The report's sets T+ and T- are the trajectories
with a positive and a non-positive advantage.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt

from ale.config import Baseline
from ale.errors import ConfigError

# Keeps the advantages of a group whose rewards hardly differ finite; an equal group has none at all and is dropped.
NORM_EPSILON = 1e-6


def needs_group(baseline: Baseline) -> bool:
    """Whether the baseline compares a trajectory with others."""
    return baseline not in ("none", "signed")


def check_baseline(baseline: Baseline, group_size: int) -> None:
    """ConfigError unless groups of this size can be trained on with this baseline."""
    if baseline not in get_args(Baseline):
        raise ConfigError(f"baseline: expected one of {get_args(Baseline)}, got {baseline!r}")
    if group_size < 1:
        raise ConfigError(f"group_size: expected at least 1, got {group_size}")
    if needs_group(baseline) and group_size < 2:
        raise ConfigError(
            f'group_size: baseline "{baseline}" compares at least 2 rollouts, got {group_size}; '
            'raise group_size, or set baseline = "signed"'
        )


def advantages(rewards_G: npt.ArrayLike, baseline: Baseline = "group_mean") -> npt.NDArray[np.float64]:
    """float64 [G]. All zero, exactly, where the baseline compares and all rewards are equal.

    none            A = R
    signed          A = +1 where R > 0, else -1
    group_mean      A = R - mean(R)
    group_norm      A = (R - mean(R)) / (population std(R) + 1e-6)
    leave_one_out   A = R - mean of the others' R

    ConfigError for an unknown baseline or a group too small for it; ValueError for a reward that is not finite (such a
    trajectory is dropped before, see `filters`).
    """
    rewards: npt.NDArray[np.float64] = np.asarray(rewards_G, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards_G: expected [G], got shape {list(rewards.shape)}")
    check_baseline(baseline, len(rewards))
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards_G: expected finite rewards, got {rewards.tolist()}")
    if baseline == "none":
        return rewards.copy()
    if baseline == "signed":
        return np.where(rewards > 0, 1.0, -1.0)
    if rewards.min() == rewards.max():  # the mean of equal floats may be off by one bit
        return np.zeros_like(rewards)
    centred: npt.NDArray[np.float64] = rewards - rewards.mean()
    if baseline == "group_norm":
        return centred / float(rewards.std() + NORM_EPSILON)
    if baseline == "leave_one_out":
        return centred * (len(rewards) / (len(rewards) - 1))
    return centred
