import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ale.algorithm.layout import Layout, Segments, chunk_lengths


def test_trajectories_are_laid_end_to_end() -> None:
    layout = Layout.of(
        [
            Segments(chunk_lengths=(2, 0, 3), advantage=0.5, carry=(False, True, True), outcome=1),
            Segments(chunk_lengths=(), advantage=-1.0),
            Segments(chunk_lengths=(4,), advantage=-0.5, rewards=(0.25,)),
        ]
    )
    assert layout.chunk_offsets.tolist() == [0, 2, 2, 5, 9]
    assert layout.trajectory_offsets.tolist() == [0, 3, 3, 4]
    assert layout.advantage_N.tolist() == [0.5, -1.0, -0.5]
    assert layout.outcome_N.tolist() == [1, -1, 0]
    assert layout.carry_C is not None
    assert layout.carry_C.tolist() == [False, True, True, True]
    assert layout.rewards_C is not None
    assert layout.rewards_C.tolist() == [0.0, 0.0, 0.0, 0.25]
    assert (layout.tokens, layout.chunks, layout.trajectories) == (9, 4, 3)


def test_what_no_trajectory_names_is_not_there() -> None:
    layout = Layout.of([Segments(chunk_lengths=(1,), advantage=1.0)])
    assert layout.carry_C is None
    assert layout.rewards_C is None


def test_a_batch_of_nothing_has_a_layout() -> None:
    layout = Layout.of([])
    assert (layout.tokens, layout.chunks, layout.trajectories) == (0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"chunk_lengths": (1, -1)}, "chunk_lengths"),
        ({"carry": (True,)}, "carry"),
        ({"rewards": (1.0, 2.0, 3.0)}, "rewards"),
        ({"rewards": (1.0, math.nan)}, "finite"),
        ({"outcome": 2}, "outcome"),
        ({"advantage": math.nan}, "finite"),
    ],
)
def test_a_trajectory_that_does_not_fit_names_the_field(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Segments(**{"chunk_lengths": (1, 2), "advantage": 1.0, **fields})  # type: ignore[arg-type]


def test_chunk_lengths_count_the_action_tokens_between_boundaries() -> None:
    assert chunk_lengths([0, 0, 1, 1, 0, 1, 0], [0, 4, 7]) == (2, 1)
    assert chunk_lengths([1, 1], [0, 0, 2, 2]) == (0, 2, 0)
    assert chunk_lengths([], [0]) == ()


@pytest.mark.parametrize("boundaries", [[], [0, 3], [1, 2], [0, 2, 1, 2]])
def test_boundaries_must_rise_from_the_start_to_the_end(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        chunk_lengths([1, 1], boundaries)


@given(st.lists(st.booleans(), max_size=30), st.data())
def test_padding_at_either_end_changes_no_chunk_length(mask: list[bool], data: st.DataObject) -> None:
    inner = sorted(data.draw(st.lists(st.integers(0, len(mask)), max_size=4)))
    boundaries = [0, *inner, len(mask)]
    plain = chunk_lengths(mask, boundaries)
    assert sum(plain) == sum(mask)
    right = chunk_lengths([*mask, *[False] * 5], [*boundaries[:-1], len(mask) + 5])
    left = chunk_lengths([*[False] * 5, *mask], [0, *[b + 5 for b in boundaries[1:]]])
    assert plain == right == left
    assert np.asarray(plain).dtype.kind in "iuf"
