"""The chance of a task, by what became of others of its kind."""

import pytest

from ale.algorithm.selection import Outcomes


def after(*solved: bool) -> Outcomes:
    outcomes = Outcomes()
    for one in solved:
        outcomes = outcomes.after(one)
    return outcomes


def test_a_kind_never_seen_or_never_solved_is_always_taken() -> None:
    assert Outcomes().chance("unsolved") == 1
    assert after(*[False] * 500).chance("unsolved") == 1


def test_a_kind_always_solved_is_taken_one_time_in_ten() -> None:
    assert after(*[True] * 500).chance("unsolved") == pytest.approx(0.1)


def test_one_success_among_few_says_little() -> None:
    assert after(True).chance("unsolved") == 0.5
    assert after(True, True).chance("unsolved") == pytest.approx(1 - 1.98 / 2.98)


def test_a_kind_solved_every_second_time_is_taken_every_second_time() -> None:
    assert after(*[True, False] * 250).chance("unsolved") == pytest.approx(0.5, abs=0.02)


def test_what_was_forgotten_by_the_policy_is_taken_again() -> None:
    assert after(*[True] * 500, *[False] * 34).chance("unsolved") == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("solved", "chance"), [(0.0, 0.1), (0.1, 0.36), (0.5, 1.0), (0.9, 0.36), (1.0, 0.1)])
def test_moderate_keeps_what_is_solved_now_and_then(solved: float, chance: float) -> None:
    outcomes = Outcomes(solved=solved * 1000, scored=1000)
    assert outcomes.chance("moderate") == pytest.approx(chance, abs=0.01)


def test_moderate_takes_every_kind_that_it_knows_nothing_of() -> None:
    assert Outcomes().chance("moderate") == 1
    assert after(False).chance("moderate") == pytest.approx(8 / 9)
    assert after(*[False] * 500).chance("moderate") == pytest.approx(0.1)


def test_all_takes_all() -> None:
    assert after(*[True] * 500).chance("all") == 1
