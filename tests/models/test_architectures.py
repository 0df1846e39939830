"""Any local causal LM goes in and comes out as a Hugging Face directory: dense or MoE, rotary or learned positions,
head tied or not. Sizes are tiny, but large enough that some layers are packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from ale.algorithm.objectives import objective
from ale.errors import ModelError
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import TRUTH_TOLERANCE, Learner, LearnerSettings
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Generate, Sample, Sampling, Trajectory
from ale.models.load import load_model, load_tokenizer
from ale.policy.engine import Engine
from ale.wire import Array

WIDTH, VOCABULARY = 128, 1100
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=256,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_inner=1024,
        initializer_range=0.1,
        eos_token_id=1,
    ),
}


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, nano_path: Path, tmp_path: Path) -> Path:
    """A random model of each kind, with the tokenizer of the nano model."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "model")
    load_tokenizer(nano_path).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def generate(path: Path, precision: torch.dtype = torch.float32) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Prompt, sampled tokens and their recorded log-probabilities of ten sequences, six of which begin alike."""
    rng = np.random.default_rng(0)
    common = rng.integers(10, VOCABULARY, 30).tolist()
    prompts = [[*common, *rng.integers(10, VOCABULARY, n).tolist()] for n in (0, 0, 1, 5, 9, 30)]
    prompts += [rng.integers(10, VOCABULARY, n).tolist() for n in (1, 8, 20, 40)]
    engine = Engine(load_model(path), rows=8, precision=precision)
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=12, seed=number)
        engine.add(number, Generate(session=str(number), prompt_T=Array.of(prompt, "int32"), sampling=sampling))
    turns = {}
    while engine.busy:
        turns |= dict(engine.step())
    assert engine.statistics().reused_tokens >= 5 * 29
    return [(p, turns[i].tokens_A.numpy().tolist(), turns[i].logp_A.numpy()) for i, p in enumerate(prompts)]


def test_engine_learner_and_transformers_give_the_same_log_probabilities(saved: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    trained = load_model(saved).eval()
    for prompt, sampled, logp_A in generate(saved):
        ids = [*prompt, *sampled]
        (batch,) = split([Array.of(ids, "int32")], [(Chunk(len(prompt), len(ids), "answer"),)], 10_000)
        with torch.no_grad():
            learner_A = action_logp(trained, batch, 1.0)[0].numpy()
            logits_TV = plain(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        plain_A = torch.log_softmax(logits_TV, -1)[torch.arange(len(sampled)), sampled].numpy()
        np.testing.assert_allclose(logp_A, learner_A, atol=TRUTH_TOLERANCE / 10)
        np.testing.assert_allclose(learner_A, plain_A, atol=TRUTH_TOLERANCE / 10)


def test_an_update_leaves_a_directory_that_transformers_loads_with_the_same_logits(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    ring = WeightRing(create_memory(), Layout.of(model, 2))
    learner = Learner(model, load_tokenizer(saved), ring, objective("ipa"), LearnerSettings(learning_rate=1e-2))
    samples = []
    for number, (prompt, sampled, logp) in enumerate(generate(saved)):
        logp_A = Array.of(logp, "float32")
        trajectory = Trajectory(
            id=str(number),
            group="g",
            task="t",
            family="f",
            level=1,
            tokens_T=Array.of([*prompt, *sampled], "int32"),
            chunks=(Chunk(len(prompt), len(prompt) + len(sampled), "answer"),),
            logp_A=logp_A,
            logp_sampled_A=logp_A,
            version_A=Array.of(np.zeros(len(logp)), "int32"),
            reward=float(number % 2),
        )
        samples.append(Sample(trajectory, 0.5 if number % 2 else -0.5))
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    metrics = learner.learn(samples)
    assert metrics.values["truth_max"] < TRUTH_TOLERANCE / 10
    assert metrics.grad_norm > 0
    assert not torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
    learner.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(10, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("saved", ["llama-untied", "qwen3", "gpt2"], indirect=True)  # whose bodies have large layers
def test_products_in_bfloat16_stay_near_the_exact_log_probabilities(saved: Path) -> None:
    exact = load_model(saved).eval()
    gaps = []
    for prompt, sampled, logp_A in generate(saved, torch.bfloat16):
        ids = [*prompt, *sampled]
        (batch,) = split([Array.of(ids, "int32")], [(Chunk(len(prompt), len(ids), "answer"),)], 10_000)
        with torch.no_grad():
            gaps.append(np.abs(action_logp(exact, batch, 1.0)[0].numpy() - logp_A))
    assert 1e-5 < np.concatenate(gaps).mean() < 0.05


Break = Callable[[Path], None]


def forget_chat_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()


def forget_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def shrink_embeddings(path: Path) -> None:
    config = LlamaConfig(**SIZES | {"vocab_size": 100})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)


def be_an_encoder_and_decoder(path: Path) -> None:
    T5Config(vocab_size=VOCABULARY, d_model=32).save_pretrained(path)


def be_of_no_known_type(path: Path) -> None:
    config = msgspec.json.decode((path / "config.json").read_bytes())
    (path / "config.json").write_bytes(msgspec.json.encode(config | {"model_type": "nonesuch"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (forget_chat_template, "has no chat template"),
        (forget_weights, r"no \*.safetensors"),
        (shrink_embeddings, "298 tokens, but the model has embeddings for 100"),
        (be_an_encoder_and_decoder, "of the type t5, which is not a causal language model"),
        (be_of_no_known_type, "cannot be used: .*nonesuch"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_in_one_paragraph(
    nano_path: Path, tmp_path: Path, damage: Break, said: str
) -> None:
    load_tokenizer(nano_path).save_pretrained(tmp_path)
    load_model(nano_path).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=said) as refused:
        load_tokenizer(tmp_path)
        load_model(tmp_path)
    assert str(refused.value).startswith("model.path: ")
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)
