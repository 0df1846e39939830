import math

import numpy as np
import pytest

from ale.algorithm.filters import Reason, group_reason, logp_reason, rollout_reason, stale_reason


def test_a_sound_rollout_has_no_reason_against_it() -> None:
    assert rollout_reason(reward=0.0, illegal_tool_calls=3, max_illegal_tool_calls=3) is None
    assert rollout_reason(reward=1.0, illegal_tool_calls=99) is None


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        ({"sandbox_failed": True}, Reason.SANDBOX_FAILURE),
        ({"policy_failed": True}, Reason.POLICY_FAILURE),
        ({"evaluator_failed": True}, Reason.EVALUATOR_ERROR),
        ({"unrepeatable_tool": True}, Reason.UNREPEATABLE_TOOL),
        ({"illegal_tool_calls": 4, "max_illegal_tool_calls": 3}, Reason.ILLEGAL_TOOL_CALLS),
    ],
)
def test_a_cause_is_named_before_the_missing_reward_it_led_to(evidence: dict[str, bool], reason: Reason) -> None:
    assert rollout_reason(reward=None, **evidence) == reason  # type: ignore[arg-type]
    assert rollout_reason(reward=1.0, **evidence) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize("reward", [None, math.nan, math.inf, -math.inf])
def test_a_missing_or_infinite_reward_drops_the_rollout(reward: float | None) -> None:
    assert rollout_reason(reward=reward) == Reason.REWARD_NOT_FINITE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probabilities_of_the_policies_that_are_not_finite_drop_the_trajectory(value: float) -> None:
    fine, broken = np.array([-1.0, -2.0]), np.array([-1.0, value])
    assert logp_reason(broken, fine, fine) == Reason.LOGP_NOT_FINITE
    assert logp_reason(fine, broken, fine) == Reason.LOGP_NOT_FINITE
    assert logp_reason(None, broken, fine) == Reason.LOGP_NOT_FINITE


def test_minus_infinity_from_the_engine_is_left_to_the_mask() -> None:
    fine = np.array([-1.0, -2.0])
    assert logp_reason(fine, fine, np.array([-1.0, -math.inf])) is None
    assert logp_reason(fine, fine, np.array([-1.0, math.nan])) == Reason.LOGP_NOT_FINITE
    assert logp_reason(fine, fine, np.array([-1.0, math.inf])) == Reason.LOGP_NOT_FINITE


def test_a_trajectory_without_action_tokens_has_nothing_to_object_to() -> None:
    assert logp_reason(np.zeros(0), np.zeros(0), np.zeros(0)) is None


def test_staleness_counts_from_the_version_trained_to_the_oldest_sampled() -> None:
    assert stale_reason(training_version=7, oldest_version=5, max_lag=2) is None
    assert stale_reason(training_version=8, oldest_version=5, max_lag=2) == Reason.STALE
    assert stale_reason(training_version=5, oldest_version=5, max_lag=0) is None
    assert stale_reason(training_version=6, oldest_version=5, max_lag=0) == Reason.STALE


def test_a_sample_from_the_future_is_an_error_not_a_discard() -> None:
    with pytest.raises(ValueError, match="oldest_version"):
        stale_reason(training_version=4, oldest_version=5, max_lag=2)


def test_a_group_of_equal_rewards_is_dropped_with_that_reason() -> None:
    assert group_reason([0.1, 0.1, 0.1], "group_mean") == Reason.ZERO_ADVANTAGE
    assert group_reason([0.0, 1.0], "group_mean") is None
    assert group_reason([0.0, 0.0], "none") == Reason.ZERO_ADVANTAGE
    assert group_reason([1.0, 1.0], "none") is None
    assert group_reason([0.0, 0.0], "signed") is None


def test_a_group_shrunk_to_one_is_dropped_not_a_crash() -> None:
    assert group_reason([1.0], "group_norm") == Reason.GROUP_TOO_SMALL
    assert group_reason([1.0], "signed") is None
    assert group_reason([], "signed") == Reason.GROUP_TOO_SMALL


def test_the_text_of_a_reason_is_its_metric() -> None:
    assert str(Reason.ZERO_ADVANTAGE) == "zero_advantage"
