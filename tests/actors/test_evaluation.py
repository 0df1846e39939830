import pytest

from ale.actors.evaluation import rate
from ale.messages import Trajectory
from ale.wire import Array

NOTHING = Array.of([], "int32")


def played(solved: int, n: int) -> list[Trajectory]:
    return [
        Trajectory(
            id=f"t{i}",
            group="g",
            task="t",
            family="copy",
            level=1,
            tokens_T=NOTHING,
            chunks=(),
            logp_A=NOTHING,
            logp_sampled_A=NOTHING,
            version_A=NOTHING,
            reward=float(i < solved),
        )
        for i in range(n)
    ]


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3: Wilson's interval for 81/263, 15/148, 0/20 and 1/29.
@pytest.mark.parametrize(
    ("solved", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(solved: int, n: int, low: float, high: float) -> None:
    result = rate(played(solved, n))
    assert (result.success, result.n) == (solved / n, n)
    assert result.ci95 == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_full_success_ends_at_one() -> None:
    assert rate(played(20, 20)).ci95[1] == 1.0
