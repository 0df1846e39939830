import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeForCausalLM

from ale.algorithm.objectives import objective
from ale.errors import LearnerError
from ale.learner import forward
from ale.learner.batch import split
from ale.learner.forward import _router_loss, action_logp
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Demonstration, Sample, Trajectory
from ale.models.load import load_model
from ale.models.nano import nano_config
from ale.wire import Array

MakeLearner = Callable[..., Learner]


@pytest.fixture
def make_learner(nano_tokenizer: Any) -> MakeLearner:
    def make(model: Any, *, slots: int = 3, name: str = "ipa", **settings: Any) -> Learner:
        ring = WeightRing(create_memory(), Layout.of(model, slots))
        return Learner(model, nano_tokenizer, ring, objective(name), LearnerSettings(**settings))  # type: ignore[arg-type]

    return make


def logp_of(model: Any, tokens: Array, chunks: tuple[Chunk, ...]) -> torch.Tensor:
    (batch,) = split([tokens], [chunks], 10_000)
    with torch.no_grad():
        return action_logp(model, batch, 1.0)[0]


@torch.no_grad()
def action_logp_under(model: Any, weights: Mapping[str, torch.Tensor], batch: Any, temperature: float) -> torch.Tensor:
    """The same under other weights of the model."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.copy_(weights[name])
    return action_logp(other, batch, temperature)[0]


def old_of(learner: Learner, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return learner._old.of([s.trajectory for s in samples], learner._idle([]))


def make_samples(model: Any, count: int = 8, *, version: int = 0, seed: int = 0, vocab: int = 300) -> list[Sample]:
    """Trajectories of different lengths, of one to three chunks, recorded as `model` would have sampled them."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in range(count):
        chunks, at = [], int(rng.integers(3, 12))
        for _ in range(int(rng.integers(1, 4))):
            end = at + int(rng.integers(1, 9))
            chunks.append(Chunk(at, end, "call"))
            at = end + int(rng.integers(1, 6))
        tokens = Array.of(rng.integers(10, vocab, at), "int32")
        logp = logp_of(model, tokens, tuple(chunks)).numpy()
        recorded = Array.of(logp, "float32")
        trajectory = Trajectory(
            id=f"t{n}",
            group="g",
            task="task",
            family="copy",
            level=1,
            tokens_T=tokens,
            chunks=tuple(chunks),
            logp_A=recorded,
            logp_sampled_A=recorded,
            version_A=Array.of(np.full(len(logp), version), "int32"),
            reward=float(n % 2),
        )
        samples.append(Sample(trajectory, 0.5 if n % 2 else -0.5))
    return samples


def changed(sample: Sample, **fields: Any) -> Sample:
    return Sample(msgspec.structs.replace(sample.trajectory, **fields), sample.advantage)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def gradient(learner: Learner, samples: Sequence[Sample]) -> torch.Tensor:
    """The clipped gradient of one update that moves nothing."""
    learner.learn(samples)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.model.parameters()]
    return torch.cat([part.flatten().double() for part in parts])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


STILL = {"learning_rate": 0.0, "max_grad_norm": 1e9}


def materialised(head: torch.nn.Module, before: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    logp = torch.log_softmax(head(before) / temperature, -1)
    return logp.gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])
def test_the_log_probabilities_and_gradients_are_those_of_all_logits(
    nano_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    torch.manual_seed(0)
    config = nano_config(nano_tokenizer)
    config.tie_word_embeddings = tied
    model = Qwen3MoeForCausalLM(config)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    samples = make_samples(model, 5)
    (batch,) = split([s.trajectory.tokens_T for s in samples], [s.trajectory.chunks for s in samples], 10_000)
    found = []
    for head_logp in (forward._head_logp, materialised):
        monkeypatch.setattr(forward, "_head_logp", head_logp)
        model.zero_grad()
        logp, _ = action_logp(model, batch, 0.6)
        logp.sum().backward()
        under = action_logp_under(model, {n: p * 1.01 for n, p in model.named_parameters()}, batch, 0.6)
        found.append((logp.detach(), under, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert not torch.equal(found[0][0], found[0][1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_head_that_is_more_than_a_matrix_is_applied_as_it_is() -> None:
    torch.manual_seed(0)
    before, ids = torch.randn(7, 16), torch.randint(0, 50, (7,))
    head = torch.nn.Linear(16, 50)
    assert forward._head_logp(head, before, ids, 0.7).tolist() == pytest.approx(
        materialised(head, before, ids, 0.7).tolist(), abs=1e-5
    )
    with torch.no_grad():
        head.bias.zero_()
    plain = torch.nn.Linear(16, 50, bias=False)
    plain.weight = head.weight
    assert forward._head_logp(head, before, ids, 0.7).tolist() == pytest.approx(
        forward._head_logp(plain, before, ids, 0.7).tolist(), abs=1e-5
    )


def test_training_with_and_without_logits_gives_the_same_losses_for_twenty_updates(
    nano_path: Path, make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for head_logp in (forward._head_logp, materialised):
        monkeypatch.setattr(forward, "_head_logp", head_logp)
        learner = make_learner(load_model(nano_path), learning_rate=1e-3, pi_old="mu")
        samples = make_samples(learner.model, 6)
        curves.append([learner.learn(samples).loss for _ in range(20)])
    assert abs(curves[0][-1] - curves[0][0]) > 0.05
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "router_loss"),
    [
        *(("ipa", 0.0), ("ipa", 1.0), ("grpo", 1.0)),
        *(pytest.param(name, 0.0, marks=pytest.mark.full) for name in ("baseline", "token", "grpo")),
        *(pytest.param(name, 1.0, marks=pytest.mark.full) for name in ("baseline", "token")),
    ],
)
def test_the_gradient_does_not_depend_on_the_split_or_the_order(
    nano_path: Path, make_learner: MakeLearner, name: str, router_loss: float
) -> None:
    samples = make_samples(load_model(nano_path), 12)
    found = []
    for micro, order in ((100_000, 1), (1, 1), (100, -1)):
        learner = make_learner(load_model(nano_path), name=name, micro_tokens=micro, router_loss=router_loss, **STILL)
        found.append(gradient(learner, samples[::order]))
    assert float(found[0].norm()) > 1e-3
    for other in found[1:]:
        assert apart(other, found[0]) < 1e-5


def test_the_router_loss_is_that_of_each_sequence_and_reaches_the_router(nano: Any, make_learner: MakeLearner) -> None:
    """Against the definition in plain loops: E sum_e f_e P_e of each layer and sequence, weighted by tokens."""
    samples = make_samples(nano, 3)
    tokens = [s.trajectory.tokens_T for s in samples]
    (batch,) = split(tokens, [s.trajectory.chunks for s in samples], 10_000)
    _, loss = action_logp(nano, batch, 1.0, router_loss=True)
    assert loss is not None
    total, count = 0.0, 0
    for array in tokens:
        ids = torch.tensor(array.numpy()[None].astype(np.int64))
        logits = nano(ids, output_router_logits=True).router_logits
        for layer in logits:
            p = layer.detach().softmax(-1)
            f = torch.zeros(8)
            for row in p:
                f[row.topk(2).indices] += 1 / len(p)
            total += float(8 * (f * p.mean(0)).sum()) * len(p)
            count += len(p)
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-5)

    learner = make_learner(nano, router_loss=1.0, **STILL)
    metrics = learner.learn([Sample(s.trajectory, 0.0) for s in samples])
    assert metrics.values["router_loss"] == pytest.approx(total / count, rel=1e-5)
    gates = [p.grad for n, p in nano.named_parameters() if n.endswith("mlp.gate.weight")]
    assert all(g is not None and g.abs().max() > 0 for g in gates)


def test_an_even_load_has_the_smallest_router_loss() -> None:
    even = torch.eye(4).repeat(4, 1) * 5
    skewed = torch.tensor([[5.0, 0, 0, 0]] * 16)
    both = [torch.arange(8), torch.arange(8, 16)]
    assert float(_router_loss([even], 1, both)) == pytest.approx(1.0)
    assert float(_router_loss([skewed], 1, both)) > 3
    noise = even.clone()
    noise[12:] = 100 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert float(_router_loss([noise], 1, [both[0], both[1][:4]])) == pytest.approx(1.0)


def test_a_sample_that_counts_for_nothing_still_counts_in_the_normaliser(
    nano_path: Path, make_learner: MakeLearner
) -> None:
    samples = make_samples(load_model(nano_path), 6)
    idle = [Sample(s.trajectory, 0.0) for s in make_samples(load_model(nano_path), 6, seed=9)]
    idle = [changed(s, id=f"idle{i}") for i, s in enumerate(idle)]
    settings = {**STILL, "router_loss": 0.0, "micro_tokens": 60}
    alone = gradient(make_learner(load_model(nano_path), **settings), samples)
    diluted = gradient(make_learner(load_model(nano_path), **settings), [*samples, *idle])
    own, all_ = (sum(s.trajectory.action_tokens for s in batch) for batch in (samples, [*samples, *idle]))
    assert apart(diluted * all_ / own, alone) < 1e-5


def test_an_update_of_rate_zero_changes_no_weight(nano: Any, make_learner: MakeLearner) -> None:
    learner = make_learner(nano, learning_rate=0.0, weight_decay=0.1)
    before = weights(nano)
    metrics = learner.learn(make_samples(nano))
    assert metrics.version == learner.version == 1
    assert metrics.grad_norm > 0
    for name, weight in weights(nano).items():
        assert torch.equal(weight, before[name]), name


def test_an_update_moves_probability_towards_what_was_rewarded(nano: Any, make_learner: MakeLearner) -> None:
    samples = make_samples(nano)
    learner = make_learner(nano, learning_rate=1e-3)
    for _ in range(3):
        learner.learn(
            [
                changed(s, version_A=Array.of(np.full(s.trajectory.action_tokens, learner.version), "int32"))
                for s in samples
            ]
        )
    for sample in samples:
        t = sample.trajectory
        gain = float(logp_of(nano, t.tokens_T, t.chunks).mean()) - float(t.logp_A.numpy().mean())
        assert gain * sample.advantage > 0


def test_a_trajectory_with_a_broken_recording_is_dropped_by_name_and_the_rest_trained(
    nano_path: Path, make_learner: MakeLearner
) -> None:
    samples = make_samples(load_model(nano_path), 6)
    broken = np.array(samples[2].trajectory.logp_A.numpy())
    broken[0] = math.nan
    bad = [*samples]
    bad[2] = changed(samples[2], logp_A=Array.of(broken, "float32"))
    learner = make_learner(load_model(nano_path), **STILL)
    found = gradient(learner, bad)
    expected = gradient(make_learner(load_model(nano_path), **STILL), samples[:2] + samples[3:])
    assert apart(found, expected) < 1e-6
    assert learner.learn(
        [changed(s, version_A=Array.of(np.ones(s.trajectory.action_tokens), "int32")) for s in bad]
    ).dropped == {"t2": "logp_not_finite"}


@pytest.mark.parametrize("pi_old", ["mu", "snapshot", "proximal"])
def test_a_trajectory_the_policy_gives_nan_is_dropped_and_the_update_is_that_of_the_rest(
    make_learner: MakeLearner, pi_old: str
) -> None:
    """The embedding of one token is NaN (the head is not tied to it): whoever holds that token gives NaN."""

    def model() -> Any:
        return tiny_llama(tie_word_embeddings=False)

    samples = make_samples(model(), 6, vocab=300)
    poison = np.array(samples[3].trajectory.tokens_T.numpy())
    poison[1] = 310
    samples[3] = changed(samples[3], tokens_T=Array.of(poison, "int32"))

    def poisoned() -> Any:
        broken = model()
        with torch.no_grad():
            broken.get_input_embeddings().weight[310] = math.nan
        return broken

    learner = make_learner(poisoned(), pi_old=pi_old, **STILL)
    metrics = learner.learn(samples)
    assert metrics.dropped == {"t3": "logp_not_finite"}
    assert metrics.version == 1
    rest = make_learner(model(), pi_old=pi_old, **STILL).learn(samples[:3] + samples[4:])
    assert metrics.loss == pytest.approx(rest.loss, rel=1e-6)
    assert metrics.grad_norm == pytest.approx(rest.grad_norm, rel=1e-6)


def test_a_batch_of_which_nothing_is_left_goes_on(nano: Any, make_learner: MakeLearner) -> None:
    samples = [
        changed(s, logp_A=Array.of(np.full(s.trajectory.action_tokens, math.nan), "float32"))
        for s in make_samples(nano, 3)
    ]
    learner = make_learner(nano, learning_rate=1.0)
    before = weights(nano)
    metrics = learner.learn(samples)
    assert set(metrics.dropped) == {"t0", "t1", "t2"}
    assert metrics.loss == metrics.grad_norm == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(nano).items())


def test_a_trajectory_without_action_tokens_trains_nothing_and_breaks_nothing(
    nano: Any, make_learner: MakeLearner
) -> None:
    empty = {"chunks": (), "logp_A": Array.of([], "float32"), "version_A": Array.of([], "int32")}
    empty["logp_sampled_A"] = empty["logp_A"]
    (sample,) = make_samples(nano, 1)
    metrics = make_learner(nano, router_loss=0.0).learn([changed(sample, **empty)])
    assert metrics.loss == metrics.grad_norm == 0
    assert metrics.dropped == {}


def test_pi_old_of_each_token_is_that_of_the_version_that_sampled_it(nano: Any, make_learner: MakeLearner) -> None:
    """A lag of two: tokens of one trajectory come from versions 0, 1 and 2."""
    learner = make_learner(nano, slots=4, learning_rate=3e-3)
    past = [weights(nano)]
    for version in range(2):
        learner.learn(make_samples(nano, 6, version=version, seed=version))
        past.append(weights(nano))
    (sample,) = make_samples(nano, 1, version=2, seed=7)
    t = sample.trajectory
    (batch,) = split([t.tokens_T], [t.chunks], 10_000)
    under = torch.stack([action_logp_under(nano, w, batch, 1.0) for w in past])
    version_A = np.arange(t.action_tokens) % 3
    expected = under[version_A, torch.arange(t.action_tokens)]
    mixed = changed(sample, version_A=Array.of(version_A, "int32"), logp_A=Array.of(expected.numpy(), "float32"))
    old, fresh = old_of(learner, [mixed])
    torch.testing.assert_close(old[t.id], expected, atol=1e-5, rtol=0)
    assert not fresh[t.id].any()  # a router's loss is not divided by Z: nothing is left to the training forward
    assert float((under[0] - under[2]).abs().max()) > 0.01

    wrong = changed(mixed, id="wrong", logp_A=Array.of(expected.numpy() + 0.5, "float32"))
    truth = learner.learn([mixed, wrong]).values
    assert truth["truth_exceptions"] == t.action_tokens
    assert truth["truth_max"] == pytest.approx(0.5, abs=1e-5)
    assert truth["truth_mean"] == pytest.approx(0.25, abs=1e-5)


def make_group(model: Any, size: int, *, group: int = 0, version: int = 0) -> list[Sample]:
    """Trajectories that continue one prompt: what a group is."""
    rng = np.random.default_rng(group)
    prompt = rng.integers(10, 300, 40)
    samples = []
    for n in range(size):
        own = rng.integers(10, 300, int(rng.integers(6, 20)))
        ids = np.concatenate([prompt, own])
        tokens, chunks = Array.of(ids, "int32"), (Chunk(40, 44, "call"), Chunk(45, len(ids), "answer"))
        logp = Array.of(logp_of(model, tokens, chunks).numpy(), "float32")
        (sample,) = make_samples(model, 1)
        fields = {"tokens_T": tokens, "chunks": chunks, "logp_A": logp, "logp_sampled_A": logp}
        versions = Array.of(np.full(len(logp.numpy()), version), "int32")
        sample = changed(sample, id=f"g{group}/{n}", version_A=versions, **fields)
        samples.append(Sample(sample.trajectory, 0.5 if n % 2 else -0.25))
    return samples


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_shared_prompt_changes_no_gradient_and_no_log_probability(
    nano_path: Path, make_learner: MakeLearner, kind: str
) -> None:
    """Four groups whose prompts stand once, against every trajectory in a row and a micro-batch of its own."""

    def model() -> Any:
        return tiny_llama() if kind == "dense" else load_model(nano_path)

    samples = [s for g in range(4) for s in make_group(model(), 5, group=g)]
    shared = make_learner(model(), **STILL)
    batches = shared._split([s.trajectory.tokens_T for s in samples], [s.trajectory.chunks for s in samples])
    assert sum(b.ids_BT.numel() for b in batches) < 0.6 * sum(b.tokens for b in batches)
    apart_ = make_learner(model(), micro_tokens=1, **STILL)
    one, other = shared.learn(samples), apart_.learn(samples)
    assert one.values["truth_max"] < 1e-5
    assert one.values["tokens"] == other.values["tokens"]
    assert one.loss == pytest.approx(other.loss, rel=1e-4)
    if kind == "moe":
        assert one.values["router_loss"] == pytest.approx(other.values["router_loss"], rel=1e-5)
    first, second = (
        torch.cat([p.grad.flatten().double() for p in m.model.parameters() if p.grad is not None])
        for m in (shared, apart_)
    )
    assert apart(first, second) < 1e-5


def test_sequences_share_a_prompt_only_where_that_saves_work() -> None:
    def cells(prompt: int, own: int, members: int) -> int:
        tokens = [Array.of(np.r_[np.arange(prompt), 1000 * n + np.arange(own)], "int32") for n in range(members)]
        chunks = [(Chunk(prompt, prompt + own, "answer"),)] * members
        return sum(b.ids_BT.numel() for b in split(tokens, chunks, 100_000, width=64))

    assert cells(prompt=40, own=5, members=6) == 40 + 6 * 5
    assert cells(prompt=4, own=200, members=6) == 6 * 204
    assert 6 * 100 < cells(prompt=20, own=100, members=6) <= 6 * 120


def test_pi_old_of_the_version_in_training_comes_from_the_training_forward(make_learner: MakeLearner) -> None:
    """A dense model, tokens of two versions: a pass under old weights for the older, none for the others; the update
    is the one that pi_old known beforehand gives."""
    learner = make_learner(tiny_llama(), learning_rate=3e-3, slots=3)
    learner.learn(make_group(learner.model, 4))
    samples = make_group(learner.model, 4, version=1)
    old_weights = learner.ring.views(learner.ring.slot_of(0))
    mixed = []
    for s in samples:
        t = s.trajectory
        (batch,) = split([t.tokens_T], [t.chunks], 10_000)
        version_A = (np.arange(t.action_tokens) >= 3).astype(np.int32)
        under_old = action_logp_under(learner.model, old_weights, batch, 1.0).numpy()
        logp = Array.of(np.where(version_A == 0, under_old, t.logp_A.numpy()), "float32")
        mixed.append(changed(s, version_A=Array.of(version_A, "int32"), logp_A=logp, logp_sampled_A=logp))
    old, fresh = old_of(learner, mixed)
    for s in mixed:
        assert fresh[s.trajectory.id].tolist() == [False] * 3 + [True] * (s.trajectory.action_tokens - 3)
        torch.testing.assert_close(old[s.trajectory.id][:3], torch.tensor(s.trajectory.logp_A.numpy()[:3]))
    start = weights(learner.model)
    reference = make_learner(tiny_llama(), pi_old="mu", **STILL)  # what was recorded is pi_old here, known beforehand
    reference.model.load_state_dict(learner.model.state_dict())
    expected = reference.learn(mixed)
    found = learner.learn(mixed)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert found.values["truth_max"] < 1e-5
    assert any(not torch.equal(w, start[name]) for name, w in weights(learner.model).items())


def test_products_in_bfloat16_stay_near_those_in_float32(make_learner: MakeLearner) -> None:
    samples = make_group(tiny_llama(), 6)
    exact = make_learner(tiny_llama(), **STILL).learn(samples)
    mixed = make_learner(tiny_llama(), precision="bfloat16", **STILL)
    rounded = mixed.learn(samples)
    assert 0 < rounded.values["truth_max"] < 0.05
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in mixed.model.parameters())


@pytest.mark.parametrize(("pi_old", "which"), [("mu", "recorded"), ("proximal", "now")])
def test_the_named_alternatives_to_the_snapshot(nano: Any, make_learner: MakeLearner, pi_old: str, which: str) -> None:
    learner = make_learner(nano, pi_old=pi_old, learning_rate=3e-3)
    (sample,) = make_samples(nano, 1)
    t = sample.trajectory
    learner.learn([sample])
    old, _ = old_of(learner, [sample])
    expected = torch.tensor(t.logp_A.numpy()) if which == "recorded" else logp_of(nano, t.tokens_T, t.chunks)
    torch.testing.assert_close(old[t.id], expected, atol=1e-5, rtol=0)
    assert "truth_max" not in learner.learn([sample]).values


def test_a_sample_whose_weights_are_gone_is_an_error_that_names_both_versions(
    nano: Any, make_learner: MakeLearner
) -> None:
    learner = make_learner(nano, slots=2)
    samples = make_samples(nano, 2)
    learner.learn(samples)
    learner.learn(samples)  # version 0 is still in the other slot
    with pytest.raises(LearnerError, match="version 0 are gone; training is at 2"):
        learner.learn(samples)
    with pytest.raises(LearnerError, match="version 3 are gone; training is at 2"):
        learner.learn(make_samples(nano, 2, version=3))


def test_a_gradient_that_is_not_finite_changes_no_weight(nano: Any, make_learner: MakeLearner) -> None:
    learner = make_learner(nano)
    samples = make_samples(nano)
    before = weights(nano)
    nano.get_output_embeddings().weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(LearnerError, match=r"update 1: the gradient norm is nan: no weight was changed"):
        learner.learn(samples)
    assert learner.version == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(nano).items())


def test_dropout_is_off_in_training(make_learner: MakeLearner) -> None:
    model = tiny_llama(attention_dropout=0.5)
    samples = make_samples(model, 4)
    learner = make_learner(model, **STILL)
    assert learner.learn(samples).values["truth_max"] < 1e-5
    again = [changed(s, version_A=Array.of(np.ones(s.trajectory.action_tokens), "int32")) for s in samples]
    metrics = learner.learn(again)
    assert metrics.values["ratio_p95"] == pytest.approx(1.0, abs=1e-5)


def tiny_llama(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_llama_trains_with_its_head_tied_or_not(make_learner: MakeLearner, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    learner = make_learner(model, learning_rate=3e-3)
    first = make_samples(model, 6)
    old = weights(model)
    metrics = learner.learn(first)
    assert "router_loss" not in metrics.values
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    t = first[0].trajectory
    (batch,) = split([t.tokens_T], [t.chunks], 10_000)
    # The old head is used with the old body: not the head of the model that is lent its shape.
    recorded = torch.tensor(t.logp_A.numpy())
    torch.testing.assert_close(action_logp_under(model, old, batch, 1.0), recorded, atol=1e-5, rtol=0)
    assert float((logp_of(model, t.tokens_T, t.chunks) - recorded).abs().max()) > 1e-3


def demonstrations(tokens: Sequence[Sequence[int]], *chunks: Chunk) -> list[Demonstration]:
    return [Demonstration(Array.of(list(t), "int32"), chunks) for t in tokens]


def test_supervised_updates_learn_four_demonstrations_by_heart(nano: Any, make_learner: MakeLearner) -> None:
    rng = np.random.default_rng(0)
    shown = demonstrations(rng.integers(10, 300, (4, 20)).tolist(), Chunk(5, 12, "call"), Chunk(15, 20, "answer"))
    learner = make_learner(nano)
    losses = [learner.imitate(shown, 1e-2).loss for _ in range(30)]
    assert losses[0] > 4
    assert losses[-1] < 0.05
    for d in shown:
        assert float(logp_of(nano, d.tokens_T, d.chunks).exp().min()) > 0.8


@pytest.mark.parametrize("mask", [{"error": True}, {"relevant": False}])
def test_a_chunk_that_erred_or_strayed_carries_no_loss(nano_path: Path, make_learner: MakeLearner, mask: Any) -> None:
    tokens = np.random.default_rng(0).integers(10, 300, (3, 20)).tolist()

    def result(*chunks: Chunk) -> tuple[float, torch.Tensor]:
        learner = make_learner(load_model(nano_path), router_loss=0.0)
        loss = learner.imitate(demonstrations(tokens, *chunks), 0.0).loss
        return loss, torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])

    good = Chunk(5, 9, "call")
    masked_loss, masked = result(good, Chunk(12, 18, "malformed", **mask))
    alone_loss, alone = result(good)
    whole_loss, _ = result(good, Chunk(12, 18, "malformed"))
    assert masked_loss == pytest.approx(alone_loss, rel=1e-6)
    assert apart(masked.double(), alone.double()) < 1e-5
    assert whole_loss != pytest.approx(alone_loss, rel=1e-4)


def test_the_warm_start_leaves_no_optimizer_state_behind(nano_path: Path, make_learner: MakeLearner) -> None:
    rng = np.random.default_rng(0)
    learner = make_learner(load_model(nano_path), warmup_steps=3, learning_rate=1e-3)
    learner.imitate(demonstrations(rng.integers(10, 300, (4, 20)).tolist(), Chunk(5, 12, "call")), 1e-2)
    learner.start_policy_optimization()
    fresh = make_learner(load_model(nano_path), warmup_steps=3, learning_rate=1e-3)
    fresh.model.load_state_dict(learner.model.state_dict())
    samples = make_samples(fresh.model, 4)
    fresh.ring.publish(0, fresh.model)
    moved = learner.learn(
        [changed(s, version_A=Array.of(np.ones(s.trajectory.action_tokens), "int32")) for s in samples]
    )
    expected = fresh.learn(samples)
    assert moved.values["learning_rate"] == expected.values["learning_rate"] == pytest.approx(1e-3 / 4)
    for (name, a), b in zip(weights(learner.model).items(), weights(fresh.model).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0, msg=name)


def test_weight_decay_in_the_warm_start_shrinks_matrices_and_leaves_gains_alone(
    nano_path: Path, make_learner: MakeLearner
) -> None:
    rng = np.random.default_rng(0)
    shown = demonstrations(rng.integers(10, 300, (4, 20)).tolist(), Chunk(5, 12, "call"))
    started = weights(load_model(nano_path))
    free, decayed = make_learner(load_model(nano_path)), make_learner(load_model(nano_path))
    free.imitate(shown, 1e-2)
    decayed.imitate(shown, 1e-2, 0.5)
    after = weights(decayed.model)
    for name, without in weights(free.model).items():
        shrunk = without - 1e-2 * 0.5 * started[name] if without.dim() > 1 else without
        torch.testing.assert_close(after[name], shrunk, atol=1e-6, rtol=0, msg=name)
    decayed.start_policy_optimization()
    assert [group["weight_decay"] for group in decayed.optimizer.param_groups] == [0.0, 0.0]


def test_the_rate_rises_and_falls_to_zero_with_the_last_step(nano: Any, make_learner: MakeLearner) -> None:
    learner = make_learner(nano, warmup_steps=1, decay_steps=4, learning_rate=1e-3)
    rates = []
    for version in range(5):
        samples = [
            changed(s, version_A=Array.of(np.full(s.trajectory.action_tokens, version), "int32"))
            for s in make_samples(nano, 1)
        ]
        rates.append(learner.learn(samples).values["learning_rate"])
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3, 0.0])


def test_a_checkpoint_loads_with_identical_logits(nano: Any, make_learner: MakeLearner, tmp_path: Path) -> None:
    learner = make_learner(nano, learning_rate=1e-2)
    learner.learn(make_samples(nano))
    learner.save(tmp_path / "checkpoint")
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "checkpoint")(ids).logits, nano(ids).logits)


def test_a_chunk_outside_its_sequence_is_refused() -> None:
    tokens = [Array.of([1, 2, 3], "int32")]
    for start, end in ((0, 2), (1, 4), (3, 2)):
        with pytest.raises(ValueError, match=f"chunk {start}..{end}"):
            split(tokens, [(Chunk(start, end, "call"),)], 100)


def test_micro_batches_keep_to_their_budget_and_lose_no_sequence() -> None:
    rng = np.random.default_rng(0)
    tokens = [Array.of(np.arange(n), "int32") for n in rng.integers(1, 60, 50)]
    batches = split(tokens, [()] * 50, 120)
    assert sorted(i for b in batches for i in b.index) == list(range(50))
    assert all(b.ids_BT.numel() <= 120 for b in batches)
    for batch in batches:
        for i, places in zip(batch.index, batch.places_N, strict=True):
            assert batch.ids_BT.flatten()[places].tolist() == tokens[i].numpy().tolist()


def test_rows_are_cut_where_padding_costs_more_than_another_micro_batch() -> None:
    tokens = [Array.of(np.arange(n), "int32") for n in (10, 11, 12, 400, 410)]

    def cut(overhead: int) -> list[list[int]]:
        return [sorted(b.index) for b in split(tokens, [()] * 5, 10_000, overhead=overhead)]

    assert cut(256) == [[0, 1, 2], [3, 4]]
    assert cut(0) == [[0], [1], [2], [3], [4]]
    assert cut(1 << 40) == [[0, 1, 2, 3, 4]]
    assert [b.ids_BT.numel() for b in split(tokens, [()] * 5, 30, overhead=256)] == [10, 24, 400, 410]
