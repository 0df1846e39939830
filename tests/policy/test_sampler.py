import math

import numpy as np
import pytest
import torch

from ale.messages import Sampling
from ale.policy.sampler import sample, uniform

DRAWS = 20_000


def draw(logits: list[float], **settings: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u = np.array([uniform(7, i) for i in range(DRAWS)])
    token, logp, sampled = sample(torch.tensor([logits] * DRAWS), [Sampling(**settings)] * DRAWS, u)  # type: ignore[arg-type]
    return token.numpy(), logp.numpy(), sampled.numpy()


def chi_square(token: np.ndarray, p: np.ndarray) -> float:
    seen = np.bincount(token, minlength=len(p))
    assert not seen[p == 0].any()
    expected = DRAWS * p[p > 0]
    return float(((seen[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_with_their_exact_probabilities(temperature: float) -> None:
    logits = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]
    token, logp, sampled = draw(logits, temperature=temperature)
    weight = np.exp(np.array(logits) / temperature)
    p = weight / weight.sum()
    assert chi_square(token, p) < 20.5  # 99.9% of chi-square with 5 degrees of freedom
    np.testing.assert_allclose(logp, np.log(p)[token], atol=1e-6)
    np.testing.assert_array_equal(logp, sampled)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 99}, 6),
        ({"top_p": 0.5}, 1),  # 0.55 reaches it
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.001}, 1),
        ({"top_p": 0.999}, 6),
        ({"top_p": 0.9, "top_k": 2}, 2),
    ],
)
def test_truncation_keeps_the_smallest_set_and_renormalises(settings: dict[str, float], kept: int) -> None:
    logits = np.array([0.0, 2.0, 1.0, -1.0, 0.5, -3.0])
    token, logp, sampled = draw(logits.tolist(), **settings)
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)[:kept]
    q = np.zeros(6)
    q[order] = p[order] / p[order].sum()
    assert set(token.tolist()) == set(order.tolist())
    if kept > 1:
        assert chi_square(token, q) < 22.5
    np.testing.assert_allclose(logp, np.log(p)[token], atol=1e-6)
    np.testing.assert_allclose(sampled, np.log(q[token]), atol=1e-6)


def test_greedy_ignores_the_random_number_and_is_certain() -> None:
    token, logp, sampled = draw([0.0, 1.0, 0.5], temperature=0.0)
    assert set(token.tolist()) == {1}
    assert logp[0] == pytest.approx(1.0 - math.log(math.e + 1 + math.exp(0.5)), abs=1e-6)
    assert not sampled.any()


def test_each_row_follows_its_own_settings() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 4)
    settings = [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(), Sampling(temperature=0.5, top_p=0.99)]
    u = np.array([0.01, 0.01, 0.01, 0.999])
    token, _, sampled = sample(logits, settings, u)
    assert token.tolist()[:3] == [1, 1, 0]
    for row in range(4):
        alone, _, alone_sampled = sample(logits[:1], settings[row : row + 1], u[row : row + 1])
        assert int(alone) == int(token[row])
        assert float(alone_sampled) == pytest.approx(float(sampled[row]), abs=1e-6)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_choose_a_token_that_can_be(u: float) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]])
    token, logp, _ = sample(logits, [Sampling()], np.array([u]))
    assert int(token) in (1, 2)
    assert math.isfinite(float(logp))


def test_a_vocabulary_of_many_blocks_is_drawn_from_as_one() -> None:
    """The two-step draw against a plain search in the whole cumulative distribution; blocks without mass among them."""
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 1024:3072] = -math.inf
    logits[::2, 4096:] = -math.inf
    u = np.array([uniform(i, 0) for i in range(62)] + [0.0, 1 - 2**-53])
    token, _, _ = sample(logits, [Sampling()] * 64, u)
    cumulative = torch.log_softmax(logits, -1).double().exp().cumsum(-1)
    at = torch.from_numpy(u)[:, None] * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=4999)
    assert (token == expected).sum() >= 62  # a draw within 1e-7 of a border may fall on its other side
    assert bool(logits[torch.arange(64), token].isfinite().all())


def test_logits_of_nan_give_a_token_whose_log_probability_says_so() -> None:
    token, logp, _ = sample(
        torch.full((2, 3000), math.nan), [Sampling(), Sampling(temperature=0.0)], np.array([0.1, 0.2])
    )
    assert bool(((token >= 0) & (token < 3000)).all())
    assert bool(logp.isnan().all())


def test_the_random_numbers_are_uniform_over_seeds_and_positions() -> None:
    by_position = np.array([uniform(3, i) for i in range(20_000)])
    by_seed = np.array([uniform(i, 3) for i in range(20_000)])
    for u in (by_position, by_seed):
        assert 0 <= u.min() < u.max() < 1
        seen = np.bincount((u * 64).astype(int), minlength=64)
        expected = len(u) / 64
        assert ((seen - expected) ** 2 / expected).sum() < 103.4  # 99.9% of chi-square with 63 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.025
    assert len(set(by_position) & set(by_seed)) == 1  # seed 3 at position 3: no other pair meets


def test_a_seed_beyond_64_bits_and_a_negative_one_are_fine() -> None:
    assert 0 <= uniform(2**70 + 1, 0) < 1
    assert 0 <= uniform(-5, 0) < 1
