"""Adapters: they are what is trained; engines and files get the model with them merged in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ale.algorithm.objectives import objective
from ale.config import LearnerConfig
from ale.errors import ConfigError, LearnerError
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.lora import add_adapters
from ale.learner.opening import publish_weights
from ale.learner.state import load_state, save_state
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Demonstration, Imitate, OpenLearner, SaveModel, SaveState
from ale.models.load import load_model
from ale.process import WorkerProcess
from ale.wire import Array

peft = pytest.importorskip("peft", reason="adapters need the extra `lora`")
TARGETS = ("q_proj", "v_proj")
DEADLINE_S = 250.0
Make = Callable[[], Learner]


@pytest.fixture
def make(nano_path: Path, nano_tokenizer: Any) -> Iterator[Make]:
    memories = []

    def make() -> Learner:
        model = load_model(nano_path)
        memories.append(create_memory())
        ring = WeightRing(memories[-1], Layout.of(model, 4))
        add_adapters(model, 4, 8.0, TARGETS)
        settings = LearnerSettings(learning_rate=1e-2, lora_rank=4, lora_alpha=8.0, lora_targets=TARGETS)
        return Learner(model, nano_tokenizer, ring, objective("ipa"), settings)

    yield make
    for fd in memories:
        os.close(fd)


def shown(seed: int) -> list[Demonstration]:
    rows = np.random.default_rng(seed).integers(10, 300, (3, 20))
    return [Demonstration(Array.of(row, "int32"), (Chunk(5, 20, "answer"),)) for row in rows]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(10, 40)[None]).logits  # type: ignore[no-any-return]


def published(learner: Learner, path: Path) -> Any:
    model = load_model(path)
    learner.ring.adopt(learner.slot, model)
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, of transformers
def test_only_adapters_are_trained_and_what_is_published_is_the_model_with_them_merged(
    make: Make, nano_path: Path, tmp_path: Path
) -> None:
    learner, plain = make(), load_model(nano_path)
    torch.testing.assert_close(logits(published(learner, nano_path)), logits(plain), atol=1e-6, rtol=0)
    losses = [learner.imitate(shown(0), 1e-2).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.3
    names = [name for name, p in learner.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * len(TARGETS)
    assert all(".lora_" in name for name in names)
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(names)
    merged = published(learner, nano_path)
    torch.testing.assert_close(logits(merged), logits(learner.model), atol=1e-5, rtol=0)
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {f"model.layers.{n}.self_attn.{t}.weight" for n in range(2) for t in TARGETS}

    learner.save(tmp_path / "hf")
    torch.testing.assert_close(logits(load_model(tmp_path / "hf")), logits(merged), atol=0, rtol=0)
    alone = peft.PeftModel.from_pretrained(load_model(nano_path), tmp_path / "hf" / "adapter")
    torch.testing.assert_close(logits(alone), logits(learner.model), atol=1e-6, rtol=0)


def test_a_checkpoint_of_adapters_goes_on_as_it_would_have_and_knows_earlier_ones(make: Make, tmp_path: Path) -> None:
    first = make()
    for step in range(3):
        first.imitate(shown(step), 1e-2)
    save_state(first, tmp_path / "state")
    expected = [first.imitate(shown(step), 1e-2) for step in (3, 4)]
    second = make()
    load_state(second, tmp_path / "state")
    with second.versions.under(2):
        then = {name: p.clone() for name, p in second.versions.trained().items()}
    now = second.versions.trained()
    assert all(torch.equal(then[name], second.versions.weights(2)[name]) for name in now)
    assert any(not torch.equal(then[name], p) for name, p in now.items())
    found = [second.imitate(shown(step), 1e-2) for step in (3, 4)]
    assert [(m.loss, m.grad_norm) for m in found] == [(m.loss, m.grad_norm) for m in expected]
    with pytest.raises(LearnerError, match="version 1 are gone"):
        second.versions.weights(1)


def test_a_layer_that_is_not_there_is_named_with_those_that_are(nano: Any) -> None:
    with pytest.raises(ConfigError, match=r"lora_targets: .* no linear layer up; there are: .*o_proj.*experts"):
        add_adapters(nano, 4, 8.0, ("q_proj", "up"))


def test_with_ranks_such_a_layer_is_refused_before_there_are_others(nano_path: Path) -> None:
    fd = create_memory()
    config = LearnerConfig(ranks=2, lora_rank=4, lora_targets=("up",))
    settings = OpenLearner(
        model=str(nano_path),
        weights_fd=fd,
        slots=3,
        threads=1,
        algorithm=_algorithm(),
        learner=config,
        temperature=1.0,
    )
    with pytest.raises(ConfigError, match="no linear layer up"):
        publish_weights(settings)
    os.close(fd)


@pytest.mark.full
def test_adapters_on_two_ranks_are_those_of_one(nano_path: Path, tmp_path: Path) -> None:
    async def train(ranks: int) -> tuple[list[float], Path]:
        fd = create_memory()
        config = LearnerConfig(ranks=ranks, lora_rank=4, lora_targets=TARGETS)
        settings = OpenLearner(
            model=str(nano_path),
            weights_fd=fd,
            slots=3,
            threads=1,
            algorithm=_algorithm(),
            learner=config,
            temperature=1.0,
        )
        out = tmp_path / str(ranks)
        async with WorkerProcess("ale.learner.learner_process", error=LearnerError, pass_fds=(fd,)) as worker:
            await worker.ask(settings, deadline_s=DEADLINE_S)
            losses = []
            for step in range(4):
                request = Imitate(demonstrations=tuple(shown(step)), learning_rate=1e-2)
                losses.append((await worker.ask(request, deadline_s=DEADLINE_S)).loss)
            assert (await worker.ask(SaveModel(path=str(out)), deadline_s=DEADLINE_S)).problem is None
            assert (await worker.ask(SaveState(path=str(out / "state")), deadline_s=DEADLINE_S)).problem is None
        os.close(fd)
        return losses, out

    one, two = asyncio.run(train(1)), asyncio.run(train(2))
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    torch.testing.assert_close(logits(load_model(one[1])), logits(load_model(two[1])), atol=2e-3, rtol=0)
    assert (two[1] / "adapter" / "adapter_model.safetensors").is_file()


def _algorithm() -> Any:
    from ale.config import AlgorithmConfig

    return AlgorithmConfig()
