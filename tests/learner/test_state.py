"""The learner's state: what is loaded is what was saved, and what follows is what would have followed, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ale.algorithm.objectives import objective
from ale.errors import LearnerError
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.state import load_state, save_state
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Sample, Trajectory
from ale.models.load import load_model
from ale.wire import Array

Make = Callable[[], Learner]


@pytest.fixture
def make(nano_path: Path, nano_tokenizer: Any) -> Iterator[Make]:
    memories = []

    def make() -> Learner:
        model = load_model(nano_path)
        memories.append(create_memory())
        ring = WeightRing(memories[-1], Layout.of(model, 4))  # as with max_lag = 2
        settings = LearnerSettings(learning_rate=3e-3, warmup_steps=6)
        return Learner(model, nano_tokenizer, ring, objective("ipa"), settings)

    yield make
    for memory in memories:
        os.close(memory)


def batch(learner: Learner, number: int, version: int) -> list[Sample]:
    """Two trajectories of sixteen tokens, as the policy of `version` would have recorded them."""
    rng = np.random.default_rng(number)
    samples = []
    weights = {n: v.clone() for n, v in learner.ring.views(learner.ring.slot_of(version)).items()}
    model = load_model(learner.model.name_or_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    for place in range(2):
        tokens, chunks = Array.of(rng.integers(10, 300, 16), "int32"), (Chunk(6, 16, "answer"),)
        (one,) = split([tokens], [chunks], 1000)
        with torch.no_grad():
            logp = Array.of(action_logp(model, one, 1.0)[0].numpy(), "float32")
        trajectory = Trajectory(
            id=f"g{number}/{place}",
            group=f"g{number}",
            task="t",
            family="copy",
            level=1,
            tokens_T=tokens,
            chunks=chunks,
            logp_A=logp,
            logp_sampled_A=logp,
            version_A=Array.of([version] * 10, "int32"),
            reward=float(place),
        )
        samples.append(Sample(trajectory, place - 0.5))
    return samples


def state(learner: Learner) -> dict[str, Any]:
    """Weights, optimizer, schedule, generator and every version that a sample may refer to."""
    names = {p: name for name, p in learner.model.named_parameters()}
    found: dict[str, Any] = {f"model/{name}": p.detach().clone() for p, name in names.items()}
    for parameter, kept in learner.optimizer.state.items():
        found |= {f"optimizer/{names[parameter]}/{key}": value.clone() for key, value in kept.items()}
    for version in range(max(0, learner.version - 2), learner.version + 1):
        views = learner.ring.views(learner.ring.slot_of(version))
        found |= {f"ring/{version}/{name}": view.clone() for name, view in views.items()}
    found["random"] = torch.get_rng_state()
    found["counters"] = torch.tensor([learner.version, learner.steps, learner.slot])
    found["rate"] = torch.tensor(learner._learning_rate())
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_what_is_loaded_is_what_was_saved_and_goes_on_as_it_would_have(make: Make, tmp_path: Path) -> None:
    first = make()
    for number in range(3):
        first.learn(batch(first, number, first.version))
    save_state(first, tmp_path / "state")
    saved = state(first)
    assert len([name for name in saved if name.startswith("optimizer/")]) > 3
    later = [batch(first, 3, 1), batch(first, 4, 3)]  # the first of them two versions old
    expected = [first.learn(samples) for samples in later]
    after = state(first)

    second = make()
    torch.manual_seed(1234)
    load_state(second, tmp_path / "state")
    same(state(second), saved)
    found = [second.learn(samples) for samples in later]
    assert [(m.loss, m.grad_norm, m.version) for m in found] == [(m.loss, m.grad_norm, m.version) for m in expected]
    same(state(second), after)


def test_the_state_before_the_first_step_has_no_optimizer(make: Make, tmp_path: Path) -> None:
    save_state(make(), tmp_path / "state")
    assert {name.split("/")[0] for name in load_file(tmp_path / "state")} == {"model", "random", "counters"}
    second = make()
    load_state(second, tmp_path / "state")
    assert (second.version, second.steps, len(second.optimizer.state)) == (0, 0, 0)


def test_the_state_of_another_model_is_refused(make: Make, tmp_path: Path) -> None:
    first = make()
    save_state(first, tmp_path / "state")
    second = make()
    second.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    before = state(second)
    with pytest.raises(LearnerError, match="that of another model"):
        load_state(second, tmp_path / "state")
    same(state(second), before)


def test_a_file_that_is_no_state_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"noise")
    with pytest.raises(LearnerError, match="cannot be read"):
        load_state(make(), tmp_path / "state")


def test_an_update_of_which_nothing_is_left_publishes_the_weights_as_they_are(make: Make) -> None:
    """The clock of versions goes on, as the slots and the lag of what is under way are counted by it; the optimizer and
    its schedule stand still."""
    learner = make()
    learner.learn(batch(learner, 0, 0))
    before = state(learner)
    nan = Array.of([float("nan")] * 10, "float32")
    lost = [Sample(_replace(sample.trajectory, logp_A=nan), sample.advantage) for sample in batch(learner, 1, 1)]
    metrics = learner.learn(lost)
    assert metrics.version == learner.version == 2
    assert set(metrics.dropped) == {"g1/0", "g1/1"}
    after = state(learner)
    for name in before:
        if name.startswith(("model/", "optimizer/")) or name == "rate":
            assert torch.equal(before[name], after[name]), name
    published = learner.ring.views(metrics.slot)
    assert all(torch.equal(published[name], p) for name, p in learner.model.named_parameters())


def _replace(trajectory: Trajectory, **fields: Any) -> Trajectory:
    import msgspec

    return msgspec.structs.replace(trajectory, **fields)
