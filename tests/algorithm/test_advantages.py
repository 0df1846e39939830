import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ale.algorithm.advantages import advantages, check_baseline
from ale.algorithm.returns import chunk_returns
from ale.config import Baseline
from ale.errors import ConfigError

GROUP = ["group_mean", "group_norm", "leave_one_out"]


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", [1.0, 0.0, 0.0, 0.5]),
        ("signed", [1.0, -1.0, -1.0, 1.0]),
        ("group_mean", [0.625, -0.375, -0.375, 0.125]),
        # population variance (0.625^2 + 2 * 0.375^2 + 0.125^2) / 4 = 0.171875
        ("group_norm", [x / (math.sqrt(0.171875) + 1e-6) for x in (0.625, -0.375, -0.375, 0.125)]),
        ("leave_one_out", [1.0 - 0.5 / 3, 0.0 - 1.5 / 3, 0.0 - 1.5 / 3, 0.5 - 1.0 / 3]),
    ],
)
def test_each_baseline_gives_the_numbers_worked_by_hand(baseline: Baseline, expected: list[float]) -> None:
    assert advantages([1.0, 0.0, 0.0, 0.5], baseline).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("baseline", GROUP)
def test_a_group_of_one_is_a_configuration_error_that_says_how_to_mend_it(baseline: Baseline) -> None:
    with pytest.raises(ConfigError, match='at least 2 rollouts, got 1; raise group_size, or set baseline = "signed"'):
        advantages([1.0], baseline)
    with pytest.raises(ConfigError, match="group_size"):
        check_baseline(baseline, 1)


def test_a_group_of_one_is_enough_without_comparison() -> None:
    assert advantages([1.0], "none").tolist() == [1.0]
    assert advantages([0.0], "signed").tolist() == [-1.0]


@pytest.mark.parametrize("baseline", GROUP)
def test_equal_rewards_give_exactly_zero_though_their_mean_is_rounded(baseline: Baseline) -> None:
    rewards = [0.1] * 3
    assert np.mean(rewards) != 0.1
    assert advantages(rewards, baseline).tolist() == [0.0] * 3


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_never_becomes_an_advantage(reward: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages([1.0, reward], "group_mean")


def test_an_unknown_baseline_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="baseline: expected one of"):
        advantages([1.0, 0.0], "median")  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=16), st.sampled_from(GROUP), st.randoms())
def test_advantages_of_a_group_sum_to_zero_and_do_not_depend_on_its_order(rewards, baseline, random) -> None:  # type: ignore[no-untyped-def]
    before = advantages(rewards, baseline)
    assert before.sum() == pytest.approx(0.0, abs=1e-9)
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = advantages([rewards[i] for i in order], baseline)
    assert shuffled.tolist() == pytest.approx(before[order].tolist())


# --- returns ----------------------------------------------------------------------------------------------------------


def test_returns_are_discounted_from_the_last_chunk() -> None:
    assert chunk_returns(2.0, 3, gamma=0.5).tolist() == [0.5, 1.0, 2.0]


def test_returns_end_at_the_outcome_chunk() -> None:
    assert chunk_returns(1.0, 4, gamma=0.5, outcome=1).tolist() == [0.5, 1.0, 0.0, 0.0]


def test_intrinsic_rewards_add_to_the_returns_before_them() -> None:
    assert chunk_returns(1.0, 3, gamma=0.5, rewards_K=[0.0, 4.0, 0.0]).tolist() == [2.25, 4.5, 1.0]


def test_returns_of_one_chunk_with_gamma_zero_are_its_advantage() -> None:
    assert chunk_returns(-1.0, 1, gamma=0.0).tolist() == [-1.0]
    assert chunk_returns(-1.0, 0, gamma=0.0).tolist() == []


@pytest.mark.parametrize(("outcome", "rewards"), [(3, ()), (-1, ()), (None, (1.0,))])
def test_returns_name_what_does_not_fit(outcome: int | None, rewards: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        chunk_returns(1.0, 3, outcome=outcome, rewards_K=rewards)
