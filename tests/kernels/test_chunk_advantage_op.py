"""`chunk_advantage` against numbers worked by hand, its reference, and every edge case of the objective.

`test_chunk_advantage_kernel.py` runs this file a second time under Triton's interpreter, where the same calls take the
kernels; `torch.empty` is filled with NaN either way.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.kernels.chunk_advantage import ChunkAdvantage, Counts, Statistics, Weighting, chunk_advantage, chunk_counts
from ale.kernels.chunk_advantage.reference import chunk_advantage_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes with numpy, which warns where a GPU returns inf or NaN as it should.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] if INTERPRETED else []
# A call takes 0.2 s there. What only repeats the equations over a grid is run there by the full suite.
EXAMPLES = int(os.environ.get("ALE_EXAMPLES", 3)) if INTERPRETED else 60
GRID = [pytest.mark.full] if INTERPRETED else []
LN2 = math.log(2.0)

ALGORITHMS = {
    "ipa": Weighting(),
    "ipa_both_sides": Weighting(mask_low=0.6, mask_high=1.6),
    "baseline": Weighting(gamma=1.0, ratio_level="sequence", mask_level="token"),
    "token": Weighting(gamma=1.0, ratio_level="token", mask_level="token"),
    "topr": Weighting(gamma=1.0, ratio_level="sequence", ratio_mean=False, mask_high=math.inf),
    "gspo": Weighting(
        ratio_level="sequence", clip_positive=(0.0, 1.1), clip_negative=(0.9, 3.0), beyond="drop", mask_level="sequence"
    ),
    "chunk_in_token": Weighting(ratio_level="chunk", mask_level="token"),
}


@pytest.fixture(autouse=True)
def nan_in_empty() -> Iterator[None]:
    """In deterministic mode `torch.empty` holds NaN: whoever reads what was never written is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


Chunks = list[list[int]]


def offsets(lengths: Chunks) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = accumulate(chain.from_iterable(lengths), initial=0)
    return torch.tensor(list(chunks)), torch.tensor(list(accumulate(map(len, lengths), initial=0)))


def draw(lengths: Chunks, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Log-probabilities and advantages of that layout; those of a trajectory depend on its index in no way."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(map(sum, lengths))
    logp = -torch.rand(tokens, generator=generator, dtype=torch.float64) * 3
    old = logp + torch.randn(tokens, generator=generator, dtype=torch.float64) * 0.4
    mu = old + torch.randn(tokens, generator=generator, dtype=torch.float64) * 0.8
    chunk, trajectory = offsets(lengths)
    return {
        "logp_T": logp.to(dtype),
        "logp_old_T": old.to(dtype),
        "logp_mu_T": mu.to(dtype),
        "chunk_offsets": chunk,
        "trajectory_offsets": trajectory,
        "advantage_N": torch.randn(len(lengths), generator=generator),
    }


def solve(arguments: dict[str, Any], op: Any = chunk_advantage, **changes: Any) -> tuple[ChunkAdvantage, torch.Tensor]:
    """The op's answer and its gradient."""
    arguments = {**arguments, **changes}
    logp = arguments["logp_T"].clone().requires_grad_()
    result: ChunkAdvantage = op(**{**arguments, "logp_T": logp})
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    return result, logp.grad


def assert_matches_reference(arguments: dict[str, Any], tolerance: float = 1e-5, **changes: Any) -> None:
    ours, gradient = solve(arguments, **changes)
    wide = {k: v.double() if k.startswith("logp") and v is not None else v for k, v in arguments.items()}
    theirs, expected = solve(wide, chunk_advantage_reference, **changes)
    close = {"rtol": tolerance, "atol": tolerance * 1e-1}
    for name in ("loss", "return_C", "weight_U", "log_ratio_U", "log_mismatch_U"):
        torch.testing.assert_close(getattr(ours, name).detach().double(), getattr(theirs, name).detach(), **close)
    for name in ("mask_U", "tokens_U", "positive_U"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(gradient.double(), expected, **close)


RAGGED: Chunks = [[3, 1, 7], [5], [2, 0, 4, 1], [], [0]]
TWO: Chunks = [[2, 1], [2]]


def worked_by_hand(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A success of two chunks and a failure of one whose tokens became half as likely: rho = 1/2."""
    chunk, trajectory = offsets(TWO)
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0], dtype=dtype)
    old = logp + torch.tensor([0.3, 0.3, -0.1, LN2, LN2], dtype=dtype)
    return {
        "logp_T": logp,
        "logp_old_T": old,
        "logp_mu_T": old.clone(),
        "chunk_offsets": chunk,
        "trajectory_offsets": trajectory,
        "advantage_N": torch.tensor([1.0, -1.0]),
        "weighting": Weighting(gamma=0.5),
    }


# --- the equations ----------------------------------------------------------------------------------------------------


def test_returns_weights_loss_and_gradient_are_those_worked_by_hand() -> None:
    result, gradient = solve(worked_by_hand())
    torch.testing.assert_close(result.return_C, torch.tensor([0.5, 1.0, -1.0]))
    torch.testing.assert_close(result.weight_U, torch.tensor([0.5, 1.0, -0.5]))
    torch.testing.assert_close(result.log_ratio_U.exp(), torch.tensor([math.exp(-0.3), math.exp(0.1), 0.5]))
    assert result.loss.item() == pytest.approx(-(0.5 * -3 + 1.0 * -3 - 0.5 * -2) / 5)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, -0.5, -1.0, 0.5, 0.5]) / 5)


def test_the_baseline_has_one_ratio_a_trajectory_and_a_mask_a_token() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"][1] -= math.log(3.0)  # pi_old / mu = 3 > 2: this token only
    result, gradient = solve(arguments, weighting=ALGORITHMS["baseline"])
    assert result.log_ratio_U[:3].tolist() == pytest.approx([(-0.3 - 0.3 + 0.1) / 3] * 3)
    assert result.mask_U.tolist() == [True, False, True, True, True]
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.0, -1.0, 0.5, 0.5]) / 4)


def test_the_ratio_of_topr_is_the_product_over_the_trajectory() -> None:
    result, _ = solve(worked_by_hand(), weighting=ALGORITHMS["topr"])
    torch.testing.assert_close(result.weight_U, torch.tensor([1.0, 1.0, -0.25]))


def test_dropping_beyond_the_bounds_is_the_gradient_of_ppo() -> None:
    arguments = worked_by_hand(torch.float64)
    rule = Weighting(
        gamma=1.0,
        ratio_level="token",
        clip_positive=(0.0, 1.2),
        clip_negative=(0.8, 3.0),
        beyond="drop",
        mask_high=math.inf,
    )
    arguments["logp_old_T"] -= torch.tensor([0.0, 0.7, 0.0, 0.0, 1.2], dtype=torch.float64)
    _, gradient = solve(arguments, weighting=rule)
    logp = arguments["logp_T"].clone().requires_grad_()
    ratio, advantage = (logp - arguments["logp_old_T"]).exp(), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    ppo = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    (-torch.where(advantage < 0, torch.maximum(ppo, 3.0 * advantage), ppo).sum() / 5).backward()
    torch.testing.assert_close(gradient, logp.grad)


def test_without_pi_old_the_ratio_is_the_geometric_mean_probability() -> None:
    arguments = {**worked_by_hand(), "logp_old_T": None, "logp_mu_T": None}
    result, _ = solve(arguments, weighting=Weighting(gamma=0.5, clip_positive=(0.0, 1.0)))
    q = [math.exp(-1.5), math.exp(-3.0), math.exp(-1.0)]
    torch.testing.assert_close(result.weight_U, torch.tensor([0.5 * q[0], q[1], -q[2]]))


def test_the_gradient_reaches_the_policy_in_training_only() -> None:
    arguments = worked_by_hand()
    others = [arguments[name].requires_grad_() for name in ("logp_old_T", "logp_mu_T", "advantage_N")]
    solve(arguments)
    assert all(other.grad is None for other in others)


def test_gradcheck_in_float64_where_the_ratio_is_clipped_and_so_constant() -> None:
    arguments = worked_by_hand(torch.float64)
    arguments["logp_old_T"][3:] = -3.0  # rho > 1 on the negative side: factor 1 all around
    logp = arguments.pop("logp_T").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: chunk_advantage(x, **arguments).loss, logp)
    assert torch.autograd.gradcheck(lambda x: chunk_advantage_reference(x, **arguments).loss, logp)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "normalization", ["token", pytest.param("sequence", marks=GRID), pytest.param("sequence_token", marks=GRID)]
)
def test_every_algorithm_matches_the_float64_reference(name: str, normalization: Any) -> None:
    assert_matches_reference(draw(RAGGED, seed=3), weighting=replace(ALGORITHMS[name], normalization=normalization))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs_are_summed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    arguments = draw([[300, 41], [500]], seed=1, dtype=dtype)
    assert_matches_reference(arguments, tolerance)
    ours, _ = solve(arguments)
    wide, _ = solve({k: v.double() if k.startswith("logp") else v for k, v in arguments.items()})
    torch.testing.assert_close(ours.log_ratio_U.double(), wide.log_ratio_U, rtol=1e-5, atol=1e-6)


def improbable(lengths: Chunks, mean: float) -> dict[str, Any]:
    """Policies that agree to a percent on tokens they find improbable: sums are large and their difference is not."""
    arguments = draw(lengths, seed=11)
    old = arguments["logp_T"] + mean
    noise = torch.randn(2, len(old), generator=torch.Generator().manual_seed(12)) * 0.01
    return {**arguments, "logp_T": old + noise[0], "logp_old_T": old, "logp_mu_T": old + noise[1]}


def test_a_mean_ratio_of_improbable_tokens_is_within_1e_5_of_float64() -> None:
    rule = Weighting(clip_positive=(0.0, 4.0), clip_negative=(0.0, 4.0))
    assert_ratios_are_those_of_float64(improbable([[1, 7, 64, 1000], [30_000, 2], [64] * 40], mean=-10.0), rule)


def test_a_ratio_that_is_a_product_over_ten_thousand_tokens_is_within_1e_5_of_float64() -> None:
    rule = replace(ALGORITHMS["topr"], clip_positive=(0.0, 4.0), clip_negative=(0.0, 4.0))
    assert_ratios_are_those_of_float64(improbable([[50] * 200, [10_000]], mean=-1.0), rule)


def assert_ratios_are_those_of_float64(arguments: dict[str, Any], rule: Weighting) -> None:
    ours, gradient = solve(arguments, weighting=rule)
    wide, exact = solve({k: v.double() if k.startswith("logp") else v for k, v in arguments.items()}, weighting=rule)
    assert torch.equal(ours.mask_U, wide.mask_U)
    torch.testing.assert_close(ours.weight_U.double(), wide.weight_U, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.loss.double(), wide.loss, rtol=1e-5, atol=0)


# --- rewards within a trajectory --------------------------------------------------------------------------------------


def test_intrinsic_rewards_are_discounted_from_their_own_chunk() -> None:
    result, _ = solve(worked_by_hand(), chunk_rewards_C=torch.tensor([0.0, 0.2, 0.4]))
    torch.testing.assert_close(result.return_C, torch.tensor([0.6, 1.2, -0.6]))


def test_a_chunk_that_pushes_down_is_clipped_whatever_its_trajectory_did() -> None:
    arguments = worked_by_hand()
    result, _ = solve(arguments, chunk_rewards_C=torch.tensor([-2.0, 0.0, 0.0]))
    assert result.return_C[0].item() == pytest.approx(-1.5)
    assert result.weight_U[0].item() == pytest.approx(-1.5 * math.exp(-0.3))


def test_chunks_after_the_outcome_chunk_get_nothing() -> None:
    result, gradient = solve(worked_by_hand(), outcome_chunk_N=torch.tensor([0, 0]))
    torch.testing.assert_close(result.return_C, torch.tensor([1.0, 0.0, -1.0]))
    assert gradient[2] == 0


# --- the mismatch mask ------------------------------------------------------------------------------------------------


def test_a_chunk_exactly_at_the_bound_is_kept_and_one_above_is_masked() -> None:
    arguments = worked_by_hand()
    old = arguments["logp_old_T"]
    arguments["logp_mu_T"] = old - torch.tensor([0.0, 0.0, 1.01 * LN2, 0.0, 0.0])
    at_one, _ = solve(arguments, weighting=Weighting(mask_high=1.0))
    assert at_one.mask_U.tolist() == [True, False, True]
    assert solve(arguments)[0].mask_U.tolist() == [True, False, True]


def test_the_mask_of_a_chunk_is_of_its_geometric_mean_not_of_its_tokens() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"] = arguments["logp_old_T"] - torch.tensor([math.log(3.9), 0.0, 0.0, math.log(4.1), 0.0])
    assert solve(arguments)[0].mask_U.tolist() == [True, True, False]


def test_a_lower_bound_masks_the_other_side() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"] = arguments["logp_old_T"] + torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])
    assert solve(arguments)[0].mask_U.all()
    result, _ = solve(arguments, weighting=Weighting(mask_low=0.5))
    statistics = result.statistics()
    assert (statistics.units_low, statistics.units_high) == (1, 0)
    assert statistics.masked_share_low == pytest.approx(1 / 5)


def test_minus_infinity_from_the_engine_is_masked_and_never_nan() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"][0] = -math.inf
    result, gradient = solve(arguments)
    assert result.log_mismatch_U[0] == math.inf
    assert result.mask_U.tolist() == [False, True, True]
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -1.0, 0.5, 0.5]) / 3)
    assert result.statistics().masked_share_high == pytest.approx(2 / 5)


def test_minus_infinity_on_both_sides_of_the_mismatch_is_masked() -> None:
    arguments = worked_by_hand()
    arguments["logp_old_T"][0] = arguments["logp_mu_T"][0] = -math.inf
    result, gradient = solve(arguments)
    assert result.mask_U.tolist() == [False, True, True]
    assert gradient.isfinite().all()
    assert result.loss.isfinite()


def test_a_masked_chunk_may_hold_anything() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"][3] = -math.inf
    arguments["logp_T"][3] = -math.inf
    result, gradient = solve(arguments)
    assert result.loss.isfinite()
    assert gradient[3:].tolist() == [0.0, 0.0]


def test_an_all_masked_batch_has_loss_and_gradient_zero_and_says_so() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"] = torch.full((5,), -math.inf)
    for rule in (Weighting(), Weighting(normalization="sequence"), Weighting(normalization="sequence_token")):
        result, gradient = solve(arguments, weighting=rule)
        assert result.loss.item() == 0
        assert gradient.tolist() == [0.0] * 5
        assert result.statistics().all_masked
    assert not solve(worked_by_hand())[0].statistics().all_masked


# --- edge cases of the layout -----------------------------------------------------------------------------------------


def test_an_empty_chunk_contributes_nothing_and_divides_by_nothing() -> None:
    arguments = worked_by_hand()
    without, gradient = solve(arguments)
    chunk, trajectory = offsets([[2, 0, 1, 0], [2]])
    result, same = solve(
        {**arguments, "chunk_offsets": chunk, "trajectory_offsets": trajectory},
        outcome_chunk_N=torch.tensor([2, 0]),
        weighting=Weighting(gamma=1.0),
    )
    assert result.weight_U.tolist() == [1.0, 0.0, 1.0, 0.0, -0.5]
    assert result.mask_U.tolist() == [True, False, True, False, True]
    assert result.log_ratio_U.isfinite().all()
    assert without.loss.isfinite()
    assert same.shape == gradient.shape


def test_a_trajectory_of_one_chunk_keeps_its_advantage() -> None:
    result, _ = solve(draw([[4]], seed=2), weighting=Weighting(gamma=0.3))
    assert result.return_C[0] == draw([[4]], seed=2)["advantage_N"][0]


def test_one_chunk_with_gamma_zero_keeps_its_return() -> None:
    result, _ = solve(worked_by_hand(), weighting=Weighting(gamma=0.0))
    assert result.return_C.tolist() == [0.0, 1.0, -1.0]  # 0^0 = 1


def test_gamma_one_does_not_discount() -> None:
    result, _ = solve(draw([[1] * 9], seed=2), weighting=Weighting(gamma=1.0))
    assert len(set(result.return_C.tolist())) == 1


def test_a_ratio_that_overflows_fp32_is_clipped() -> None:
    arguments = worked_by_hand()
    arguments["logp_old_T"] = arguments["logp_T"] - 1000.0
    result, gradient = solve(arguments, logp_mu_T=arguments["logp_old_T"])
    assert result.log_ratio_U.tolist() == pytest.approx([1000.0] * 3)
    torch.testing.assert_close(result.weight_U, torch.tensor([0.5, 1.0, -1.0]))
    assert gradient.isfinite().all()
    dropped, gradient = solve(arguments, weighting=Weighting(clip_positive=(0, 1.2), beyond="drop", mask_high=math.inf))
    assert dropped.weight_U.tolist() == [0.0, 0.0, 0.0]
    assert dropped.statistics().ratio_quantile(0.5) > 1e6


def test_a_ratio_that_underflows_to_zero_takes_a_failure_out() -> None:
    arguments = worked_by_hand()
    arguments["logp_old_T"] = arguments["logp_T"] + 1000.0
    result, gradient = solve(arguments, logp_mu_T=arguments["logp_old_T"])
    assert result.weight_U.tolist() == [0.5, 1.0, 0.0]
    assert gradient.isfinite().all()


def test_trajectories_of_one_and_of_a_thousand_chunks_in_one_batch() -> None:
    for gamma in (0.95, 0.999):
        arguments = draw([[3], [1] * 1000, [2, 2]], seed=4)
        result, _ = solve(arguments, weighting=Weighting(gamma=gamma))
        expected = arguments["advantage_N"][1].double() * gamma ** torch.arange(999, -1, -1, dtype=torch.float64)
        torch.testing.assert_close(result.return_C[1:1001].double(), expected, rtol=1e-5, atol=1e-37)


def test_chunks_of_one_and_of_a_hundred_thousand_tokens_in_one_batch() -> None:
    assert_matches_reference(draw([[1, 100_000, 1], [1]], seed=5), weighting=Weighting(clip_positive=(0.0, 2.0)))


def test_tokens_that_do_not_carry_the_loss_are_never_used() -> None:
    """Padding to a fixed shape: a trailing trajectory with anything in it, carried by nobody."""
    arguments = draw([[3, 2], [4]], seed=6)
    for rule in ALGORITHMS.values():
        plain, gradient = solve(arguments, weighting=rule)
        padded = {**arguments, "advantage_N": torch.cat([arguments["advantage_N"], torch.tensor([9.0])])}
        for name in ("logp_T", "logp_old_T", "logp_mu_T"):
            padded[name] = torch.cat([arguments[name], torch.tensor([math.nan, -math.inf, math.inf, 0.0])])
        padded["chunk_offsets"], padded["trajectory_offsets"] = offsets([[3, 2], [4], [4]])
        result, longer = solve(padded, weighting=rule, carry_C=torch.tensor([True, True, True, False]))
        assert torch.equal(result.loss, plain.loss)
        assert torch.equal(longer, torch.cat([gradient, torch.zeros(4)]))
        assert result.statistics() == plain.statistics()


def test_prefilled_chunks_leave_the_weights_of_the_others_alone() -> None:
    arguments = draw([[3, 2, 4]], seed=7)
    result, gradient = solve(arguments, carry_C=torch.tensor([False, True, True]))
    whole, _ = solve(arguments)
    assert torch.equal(result.weight_U[1:], whole.weight_U[1:])
    assert gradient[:3].tolist() == [0.0] * 3
    assert_matches_reference(arguments, weighting=ALGORITHMS["baseline"], carry_C=torch.tensor([False, True, True]))


def test_a_trajectory_without_action_tokens_contributes_nothing() -> None:
    arguments = draw([[3, 2], [4]], seed=8)
    plain, gradient = solve(arguments, weighting=Weighting(normalization="sequence"))
    chunk, trajectory = offsets([[3, 2], [], [0, 0], [4]])
    a, b = arguments["advantage_N"].tolist()
    more = {**arguments, "advantage_N": torch.tensor([a, 5.0, -5.0, b])}
    more |= {"chunk_offsets": chunk, "trajectory_offsets": trajectory}
    result, same = solve(more, weighting=Weighting(normalization="sequence"))
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("lengths", [[], [[]], [[0]]], ids=["no_trajectory", "no_chunk", "no_token"])
def test_a_call_without_tokens_has_loss_zero(lengths: Chunks) -> None:
    for rule in ALGORITHMS.values():
        result, gradient = solve(draw(lengths), weighting=rule)
        assert result.loss.item() == 0
        assert gradient.shape == (0,)
        assert result.statistics().units_kept == 0


# --- independence of packing, order and split -------------------------------------------------------------------------

LAYOUTS = st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=4)


def alone(lengths: Chunks, seed: int) -> list[dict[str, Any]]:
    return [draw([chunks], seed=seed + n) for n, chunks in enumerate(lengths)]


def together(parts: list[dict[str, Any]], lengths: Chunks) -> dict[str, Any]:
    joined: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts]) for name in parts[0] if not name.endswith("offsets")
    }
    joined["chunk_offsets"], joined["trajectory_offsets"] = offsets(lengths)
    return joined


@settings(max_examples=EXAMPLES, deadline=None)
@given(LAYOUTS, st.integers(0, 2**20), st.sampled_from(sorted(ALGORITHMS)))
def test_bits_of_weights_and_gradient_do_not_depend_on_the_company(lengths: Chunks, seed: int, name: str) -> None:
    rule = ALGORITHMS[name]
    parts = alone(lengths, seed)
    whole, gradient = solve(together(parts, lengths), weighting=rule, normalizer=7.0)
    singles = [solve(part, weighting=rule, normalizer=7.0) for part in parts]
    assert torch.equal(whole.weight_U, torch.cat([single.weight_U for single, _ in singles]))
    assert torch.equal(gradient, torch.cat([single for _, single in singles]))
    backwards, reverse = solve(together(parts[::-1], lengths[::-1]), weighting=rule, normalizer=7.0)
    assert torch.equal(reverse, torch.cat([single for _, single in singles[::-1]]))
    torch.testing.assert_close(backwards.loss, whole.loss, rtol=1e-6, atol=1e-7)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    LAYOUTS,
    st.integers(0, 2**20),
    st.sampled_from(sorted(ALGORITHMS)),
    st.sampled_from(["token", "sequence", "sequence_token"]),
)
def test_the_split_of_a_batch_changes_neither_loss_nor_gradient(
    lengths: Chunks, seed: int, name: str, normalization: Any
) -> None:
    rule = replace(ALGORITHMS[name], normalization=normalization)
    parts = alone(lengths, seed)
    keys = ("logp_old_T", "logp_mu_T", "chunk_offsets", "trajectory_offsets")
    counts = [chunk_counts(*(part[key] for key in keys), weighting=rule) for part in parts]
    count = sum(counts, Counts(0, 0))
    z = float(count.tokens if normalization == "token" else count.trajectories)
    whole, gradient = solve(together(parts, lengths), weighting=rule)
    singles = [solve(part, weighting=rule, normalizer=z) for part in parts]
    assert torch.equal(gradient, torch.cat([single for _, single in singles]))
    torch.testing.assert_close(sum(s.loss for s, _ in singles), whole.loss, rtol=1e-5, atol=1e-6)
    merged, single = sum((s.statistics() for s, _ in singles), Statistics()), whole.statistics()
    assert merged.weight_sum == pytest.approx(single.weight_sum, rel=1e-6)
    assert merged.ratio_bins == single.ratio_bins
    assert (merged.tokens_kept, merged.units_clipped) == (single.tokens_kept, single.units_clipped)


@settings(max_examples=EXAMPLES, deadline=None)
@given(LAYOUTS, st.integers(0, 2**20), st.sampled_from(sorted(ALGORITHMS)), st.booleans(), st.booleans())
def test_any_layout_matches_the_reference(lengths: Chunks, seed: int, name: str, rewards: bool, carry: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = sum(map(len, lengths))
    assert_matches_reference(
        draw(lengths, seed, torch.float64),
        1e-10,
        weighting=ALGORITHMS[name],
        chunk_rewards_C=torch.randn(chunks, generator=generator) if rewards else None,
        carry_C=torch.rand(chunks, generator=generator) < 0.7 if carry else None,
    )


def test_the_same_input_gives_the_same_bits() -> None:
    arguments = draw([[200, 3, 150], [90] * 5], seed=9)
    (first, gradient), (second, again) = solve(arguments), solve(arguments)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(gradient, again)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_count_what_was_kept_masked_and_clipped() -> None:
    arguments = worked_by_hand()
    arguments["logp_mu_T"][2] = -math.inf
    arguments["logp_old_T"][3:] = -2.0  # rho = e > 1 on the negative side: clipped
    statistics = solve(arguments)[0].statistics()
    assert (statistics.units, statistics.tokens) == (3, 5)
    assert (statistics.units_kept, statistics.tokens_kept) == (2, 4)
    assert (statistics.units_high, statistics.tokens_high) == (1, 1)
    assert (statistics.units_positive, statistics.units_clipped) == (1, 1)
    assert statistics.effective_units == pytest.approx(1.5**2 / (0.5**2 + 1))


def test_quantiles_of_the_ratio_are_within_a_tenth_in_logs() -> None:
    arguments = draw([[1] * 99], seed=10)
    arguments["logp_mu_T"] = arguments["logp_old_T"]
    result, _ = solve(arguments)
    statistics = result.statistics()
    for share in (0.01, 0.1, 0.5, 0.9, 1.0):
        exact = result.log_ratio_U.sort().values[max(0, math.ceil(share * 99) - 1)].item()
        assert math.log(statistics.ratio_quantile(share)) == pytest.approx(exact, rel=0.1)
    assert Statistics().ratio_quantile(0.5) == 1.0


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_offsets": torch.tensor([0, 2, 3, 4])}, "from 0 to the 5 tokens, got 0 to 4"),
        ({"chunk_offsets": torch.tensor([1, 2, 3, 5])}, "got 1 to 5"),
        ({"chunk_offsets": torch.tensor([0, 3, 2, 5])}, "a fall at 1"),
        ({"chunk_offsets": torch.tensor([0, 2, 3, 5], dtype=torch.int32)}, "chunk_offsets: expected int64"),
        ({"chunk_offsets": torch.zeros(0, dtype=torch.int64)}, "at least one element"),
        ({"trajectory_offsets": torch.tensor([0, 2, 4])}, "from 0 to the 3 chunks"),
        ({"logp_old_T": torch.zeros(4)}, r"logp_old_T: expected \[5\]"),
        ({"logp_mu_T": torch.zeros(5, dtype=torch.int64)}, "logp_mu_T: .* got .* torch.int64"),
        ({"advantage_N": torch.zeros(3)}, r"advantage_N: expected a float \[N\] = \[2\], got \[3\]"),
        ({"chunk_rewards_C": torch.zeros(2)}, "chunk_rewards_C"),
        ({"carry_C": torch.ones(3)}, "carry_C: expected .* torch.bool"),
        ({"outcome_chunk_N": torch.tensor([2, 0])}, "a chunk of its own trajectory"),
        ({"outcome_chunk_N": torch.tensor([0])}, r"outcome_chunk_N: expected int64 \[2\]"),
        ({"normalizer": math.nan}, "normalizer"),
        ({"weighting": Weighting(normalization="constant")}, "needs a positive number"),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_what_came(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunk_advantage(**{**worked_by_hand(), **change})


def test_log_probabilities_must_be_a_float_vector() -> None:
    with pytest.raises(ValueError, match="got \\[5, 1\\]"):
        chunk_advantage(**{**worked_by_hand(), "logp_T": torch.zeros(5, 1)})


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": 1.1},
        {"gamma": math.nan},
        {"clip_positive": (1.0, math.inf)},
        {"clip_negative": (1.0, 0.5)},
        {"mask_low": 2.0},
        {"ratio_level": "turn"},
        {"beyond": "raise"},
        {"normalization": "batch"},
    ],
)
def test_a_weighting_out_of_range_is_a_value_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Weighting(**change)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is triton")
def test_the_cpu_path_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from ale.kernels.chunk_advantage import chunk_advantage\n"
        "x = torch.zeros(2, requires_grad=True); o = torch.tensor([0, 2])\n"
        "r = chunk_advantage(x, x, x, o, torch.tensor([0, 1]), torch.ones(1))\n"
        "r.loss.backward(); assert x.grad.tolist() == [-0.5, -0.5]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
