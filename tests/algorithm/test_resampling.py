import pytest
from hypothesis import given
from hypothesis import strategies as st

from ale.algorithm.resampling import (
    Expert,
    Rollback,
    Tally,
    crucial_chunks,
    fisher_p,
    il_carry,
    is_crucial,
    random_anchors,
    refresh,
    rl_carry,
    uniform_anchors,
)

ORACLE = Expert("oracle", chunks=3)


def test_rollback_starts_at_the_last_chunk_and_moves_to_the_first_as_it_succeeds() -> None:
    state = Rollback.begin(ORACLE, threshold=0.5, min_rollouts=4)
    assert state.anchor == 2
    state = state.record(2, Tally(1, 2)).record(2, Tally(1, 2))  # 2 of 4: reached
    assert state.anchor == 1
    state = state.record(1, Tally(4, 4))
    assert (state.anchor, state.finished) == (0, False)
    state = state.record(0, Tally(3, 4))
    assert state.finished
    assert state.record(0, Tally(0, 4)) == state


def test_rollback_does_not_move_before_it_has_seen_enough() -> None:
    state = Rollback.begin(ORACLE, threshold=0.5, min_rollouts=4).record(2, Tally(3, 3))
    assert state.anchor == 2


def test_a_failed_window_gives_way_to_a_new_one() -> None:
    state = Rollback.begin(ORACLE, threshold=0.5, min_rollouts=4).record(2, Tally(1, 4))
    assert (state.anchor, state.tally, state.failed) == (2, Tally(), Tally(1, 4))
    assert state.record(2, Tally(2, 4)).anchor == 1


def test_stragglers_from_an_anchor_left_behind_change_nothing() -> None:
    state = Rollback.begin(ORACLE, min_rollouts=1).record(2, Tally(1, 1))
    assert state.record(2, Tally(0, 50)) == state


def test_a_drop_of_success_on_moving_back_marks_the_crucial_chunk() -> None:
    state = Rollback.begin(ORACLE, min_rollouts=8).record(2, Tally(8, 8))
    assert state.crucial_chunk() is None
    state = state.record(1, Tally(0, 8))
    assert state.crucial_chunk() == 1
    assert state.record(1, Tally(8, 8)).crucial_chunk() is None


def test_rollback_goes_on_with_a_current_success_that_shares_the_prefix() -> None:
    state = Rollback.begin(ORACLE, min_rollouts=1)
    own = Expert("own", chunks=5, version=3)
    assert state.refreshed(own, shared_chunks=2).expert == own
    assert state.refreshed(own, shared_chunks=1).expert == ORACLE
    assert state.refreshed(Expert("short", chunks=2, version=3), shared_chunks=2).expert == ORACLE


def test_experts_are_refreshed_by_newer_then_shorter_successes() -> None:
    old, new = Expert("old", chunks=4, version=1), Expert("new", chunks=9, version=2)
    assert refresh(ORACLE, old) == old
    assert refresh(old, new) == new
    assert refresh(new, old) == new
    assert refresh(new, Expert("shorter", chunks=8, version=2)).trajectory == "shorter"
    assert refresh(new, Expert("longer", chunks=10, version=2)) == new


@pytest.mark.parametrize(("threshold", "rollouts"), [(0.0, 8), (1.1, 8), (0.5, 0)])
def test_rollback_settings_out_of_range_are_refused(threshold: float, rollouts: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Rollback.begin(ORACLE, threshold=threshold, min_rollouts=rollouts)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 99))
def test_anchors_are_distinct_in_order_and_inside(chunks: int, count: int, seed: int) -> None:
    for anchors in (uniform_anchors(chunks, count), random_anchors(chunks, count, seed)):
        assert len(anchors) == min(chunks, count)
        assert list(anchors) == sorted(set(anchors))
        assert 0 <= anchors[0] <= anchors[-1] < chunks


def test_uniform_anchors_reach_both_ends_and_random_ones_repeat_with_their_seed() -> None:
    assert uniform_anchors(10, 4) == (0, 3, 6, 9)
    assert uniform_anchors(10, 1) == (0,)
    assert random_anchors(50, 5, seed=1) == random_anchors(50, 5, seed=1) != random_anchors(50, 5, seed=2)
    with pytest.raises(ValueError, match="anchors"):
        uniform_anchors(0, 1)


def test_fisher_p_is_that_of_the_table_worked_by_hand() -> None:
    # The lady tasting tea: 3 of 4 against 1 of 4, P(at most 1 | margins) = (1 + 16) / 70.
    assert fisher_p(Tally(1, 4), Tally(3, 4)) == pytest.approx(17 / 70)
    assert fisher_p(Tally(0, 4), Tally(4, 4)) == pytest.approx(1 / 70)
    assert fisher_p(Tally(4, 4), Tally(0, 4)) == 1.0


def test_fisher_p_without_rollouts_or_differences_is_one() -> None:
    assert fisher_p(Tally(), Tally(4, 4)) == 1.0
    assert fisher_p(Tally(), Tally()) == 1.0
    assert fisher_p(Tally(3, 3), Tally(5, 5)) == 1.0


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_fisher_p_agrees_with_counting_every_arrangement(a: int, b: int, c: int, d: int) -> None:
    """Probabilities of the hypergeometric distribution by recursion over draws, not by binomials."""
    successes, failures = a + c, b + d
    chances = {0: 1.0}
    for drawn in range(a + b):
        following: dict[int, float] = {}
        left = successes + failures - drawn
        for k, chance in chances.items():
            p = (successes - k) / left
            following[k + 1] = following.get(k + 1, 0.0) + chance * p
            following[k] = following.get(k, 0.0) + chance * (1 - p)
        chances = following
    expected = sum(chance for k, chance in chances.items() if k <= a)
    assert fisher_p(Tally(a, a + b), Tally(c, c + d)) == pytest.approx(expected, abs=1e-9)


def test_a_difference_that_chance_explains_is_not_crucial() -> None:
    assert not is_crucial(Tally(1, 4), Tally(3, 4))
    assert is_crucial(Tally(0, 8), Tally(7, 8))
    assert not is_crucial(Tally(7, 8), Tally(0, 8))


def test_crucial_chunks_are_those_where_success_appears() -> None:
    tallies = {0: Tally(0, 16), 1: Tally(1, 16), 2: Tally(15, 16), 5: Tally(16, 16)}
    assert crucial_chunks(tallies) == (1,)
    assert crucial_chunks({0: Tally(0, 16), 4: Tally(16, 16)}) == (3,)
    assert crucial_chunks({3: Tally(0, 4)}) == crucial_chunks({}) == ()


def test_many_comparisons_share_the_significance() -> None:
    pair = {0: Tally(1, 8), 1: Tally(6, 8)}
    assert crucial_chunks(pair) == (0,)
    assert crucial_chunks(pair | {k: Tally(6, 8) for k in range(2, 12)}) == ()


def test_prefilled_chunks_carry_no_policy_gradient_and_resampled_ones_do() -> None:
    assert rl_carry(4, anchor=2) == (False, False, True, True)
    assert rl_carry(2, anchor=0) == (True, True)


def test_the_expert_is_imitated_up_to_the_fork_only_where_no_rollout_succeeded() -> None:
    assert il_carry(4, fork=1, at_fork=Tally(0, 8)) == (True, True, False, False)
    assert il_carry(4, fork=1, at_fork=Tally(1, 8)) == (False,) * 4
    assert il_carry(4, fork=1, at_fork=Tally()) == (False,) * 4
    with pytest.raises(ValueError, match="fork"):
        il_carry(4, fork=4, at_fork=Tally())


def test_a_tally_cannot_hold_more_successes_than_rollouts() -> None:
    with pytest.raises(ValueError, match="Tally"):
        Tally(2, 1)
    assert Tally(1, 2) + Tally(2, 2) == Tally(3, 4)
    assert Tally().rate == 0.0
