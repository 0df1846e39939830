import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.algorithm.layout import Layout, Segments
from ale.algorithm.objectives import WEIGHTINGS, Batch, Objective, imitation, objective
from ale.errors import ConfigError
from ale.kernels.chunk_advantage import Counts, Statistics

LN2 = math.log(2.0)


def batch(trajectories: list[Segments], seed: int = 0) -> tuple[torch.Tensor, Batch]:
    layout = Layout.of(trajectories)
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(layout.tokens, generator=generator)
    old = logp + 0.3 * torch.randn(layout.tokens, generator=generator)
    mu = old + 0.7 * torch.randn(layout.tokens, generator=generator)
    return logp, Batch(layout, old, mu)


def gradient(
    goal: Objective, logp: torch.Tensor, given: Batch, count: Counts | None = None
) -> tuple[float, torch.Tensor]:
    logp = logp.clone().requires_grad_()
    result = goal.loss(logp, given, goal.count(given) if count is None else count)
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    return result.loss.item(), logp.grad


def test_supervised_loss_is_the_mean_over_tokens_of_the_turns_that_count() -> None:
    """Eq. 1 and 2: the middle turn caused a tool error (m_err = 0), the last was off the task (m_task = 0)."""
    m_err, m_task = (1, 0, 1), (1, 1, 0)
    carry = tuple(bool(e * t) for e, t in zip(m_err, m_task, strict=True))
    layout = Layout.of([Segments(chunk_lengths=(2, 1, 1), advantage=-3.0, carry=carry)])
    loss, grad = gradient(objective("sft"), torch.tensor([-1.0, -2.0, -5.0, -7.0]), Batch(layout))
    assert loss == pytest.approx(1.5)
    assert grad.tolist() == [-0.5, -0.5, 0.0, 0.0]


def test_supervised_loss_of_a_batch_where_nothing_counts_is_zero() -> None:
    layout = Layout.of([Segments(chunk_lengths=(2,), advantage=1.0, carry=(False,))])
    assert gradient(objective("sft"), torch.tensor([-1.0, -2.0]), Batch(layout)) == (0.0, pytest.approx([0.0, 0.0]))


def test_imitation_weighs_an_expert_chunk_by_its_return_and_geometric_mean_probability() -> None:
    layout = Layout.of([Segments(chunk_lengths=(2, 1), advantage=1.0)])
    logp = torch.tensor([-LN2, -3 * LN2, -LN2])  # geometric means 1/4 and 1/2
    loss, grad = gradient(imitation(gamma=0.5), logp, Batch(layout))
    assert grad.tolist() == pytest.approx([-0.5 * 0.25 / 3, -0.5 * 0.25 / 3, -0.5 / 3])
    assert loss == pytest.approx((0.125 * 4 * LN2 + 0.5 * LN2) / 3)
    _, plain = gradient(imitation("none", gamma=0.5), logp, Batch(layout))
    assert plain.tolist() == pytest.approx([-0.5 / 3, -0.5 / 3, -1 / 3])


def test_imitation_of_a_chunk_whose_probability_underflows_still_has_a_gradient() -> None:
    layout = Layout.of([Segments(chunk_lengths=(400,), advantage=1.0)])
    _, grad = gradient(imitation(), torch.full((400,), -1.0), Batch(layout))
    assert grad[0].item() == pytest.approx(-math.exp(-1.0) / 400)


def test_ipa_takes_failures_out_as_the_policy_leaves_them() -> None:
    layout = Layout.of([Segments(chunk_lengths=(1,), advantage=-1.0), Segments(chunk_lengths=(1,), advantage=1.0)])
    old = torch.tensor([-1.0, -1.0])
    _, grad = gradient(objective("ipa"), old - 2 * LN2, Batch(layout, old, old))
    assert grad.tolist() == pytest.approx([0.25 / 2, -1.0 / 2])


def test_gspo_weighs_tokens_by_the_ratio_of_the_response_and_drops_those_beyond() -> None:
    layout = Layout.of([Segments(chunk_lengths=(2, 1), advantage=1.0), Segments(chunk_lengths=(2,), advantage=1.0)])
    old = torch.full((5,), -1.0)
    logp = old + torch.tensor([1e-4, 2e-4, 0.0, 0.1, 0.1])
    _, grad = gradient(objective("gspo"), logp, Batch(layout, old, old))
    torch.testing.assert_close(grad, torch.tensor([-math.exp(1e-4) / 3 / 2] * 3 + [0.0, 0.0]))


def test_the_mask_is_inert_where_pi_old_is_taken_from_the_engine() -> None:
    logp, given = batch([Segments(chunk_lengths=(3, 2), advantage=1.0)])
    inert = Batch(given.layout, given.logp_mu_T, given.logp_mu_T)
    assert objective("ipa").count(inert) == Counts(5, 1)
    assert objective("ipa").loss(logp, inert, Counts(5, 1)).statistics().masked_share_high == 0


def test_the_normaliser_constant_divides_by_that_number() -> None:
    logp, given = batch([Segments(chunk_lengths=(3,), advantage=1.0)])
    given = Batch(given.layout, given.logp_old_T, given.logp_old_T)
    _, grad = gradient(objective("ipa", normalization="constant", constant=10.0), logp, given)
    assert grad.tolist() == pytest.approx([-0.1] * 3)


TRAJECTORY = st.builds(
    lambda lengths, advantage, prefilled: Segments(
        chunk_lengths=tuple(lengths),
        advantage=advantage,
        carry=tuple(k >= prefilled for k in range(len(lengths))),
    ),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([-1.0, -0.25, 0.5, 1.0]),
    st.integers(0, 2),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TRAJECTORY, min_size=1, max_size=5),
    st.sampled_from(sorted(WEIGHTINGS)),
    st.sampled_from(["token", "sequence", "sequence_token", "constant"]),
    st.integers(0, 2**20),
    st.randoms(),
)
def test_micro_batches_in_any_order_add_up_to_the_batch(
    trajectories: list[Segments], name: Any, normalization: Any, seed: int, random: Any
) -> None:
    goal = objective(name, normalization=normalization, constant=3.0 if normalization == "constant" else None)
    random.shuffle(trajectories)
    cut = random.randint(0, len(trajectories))
    logp, whole = batch(trajectories, seed)
    assert whole.logp_old_T is not None
    assert whole.logp_mu_T is not None
    parts, at = [], 0
    for part in (trajectories[:cut], trajectories[cut:]):
        layout = Layout.of(part)
        tokens = slice(at, at + layout.tokens)
        parts.append((logp[tokens], Batch(layout, whole.logp_old_T[tokens], whole.logp_mu_T[tokens])))
        at += layout.tokens
    count = sum((goal.count(part) for _, part in parts), Counts(0, 0))
    assert count == goal.count(whole)
    loss, grad = gradient(goal, logp, whole)
    micro = [gradient(goal, *part, count) for part in parts]
    assert torch.equal(torch.cat([g for _, g in micro]), grad)
    assert sum(x for x, _ in micro) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    merged = sum((goal.loss(*part, count).statistics() for part in parts), Statistics())
    single = goal.loss(logp, whole, count).statistics()
    assert merged.tokens_kept == single.tokens_kept == count.tokens
    assert merged.ratio_bins == single.ratio_bins


def test_an_objective_that_needs_pi_old_says_so() -> None:
    layout = Layout.of([Segments(chunk_lengths=(1,), advantage=1.0)])
    with pytest.raises(ValueError, match='objective "ipa" needs pi_old'):
        objective("ipa").count(Batch(layout))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ppo", {}, "objective: expected one of"),
        ("ipa", {"gama": 0.9}, "gama"),
        ("ipa", {"gamma": 2.0}, "gamma"),
        ("ipa", {"normalization": "constant"}, "constant: expected a positive number"),
        ("ipa", {"constant": 5.0}, "None with any other"),
        ("ipa", {"normalization": "constant", "constant": -1.0}, "constant"),
    ],
)
def test_a_setting_that_makes_no_sense_is_a_configuration_error(
    name: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(name, **changes)
    with pytest.raises(ConfigError, match="il_weight"):
        imitation("product")  # type: ignore[arg-type]


def test_everything_but_the_objectives_loads_no_torch() -> None:
    modules = ", ".join(
        f"ale.algorithm.{name}" for name in ("advantages", "filters", "layout", "resampling", "returns")
    )
    program = f"import sys, {modules}; assert not {{'torch', 'triton'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
