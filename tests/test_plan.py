"""The plan of a run: against numbers worked by hand, and against what the learner really keeps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from ale.algorithm.objectives import objective
from ale.cli import app
from ale.commands.plan import parse_devices
from ale.config import RunConfig
from ale.config_file import load, parse
from ale.errors import ConfigError
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.sharding import checkpoint_activations, decoder_layers
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Demonstration
from ale.models.load import read_config
from ale.models.shape import ModelShape, shape_of
from ale.plan import GIB, KNOWN, Device, Devices, activations, kv_bytes, layer_activations, plan, training, update_flops
from ale.wire import Array

ROOT = Path(__file__).parents[1]
LLAMA = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MOE = LLAMA | {"moe_intermediate_size": 96, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
EIGHT = Devices("cuda", 8, KNOWN[80])


def config(**sections: Any) -> RunConfig:
    return parse({"name": "x", **sections})


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return shape_of(read_config(ROOT / "examples" / "qwen3-30b-a3b"))


def test_the_shape_of_qwen3_30b_a3b_is_that_of_its_name(qwen: ModelShape) -> None:
    """By hand: a layer has attention 2 * 2048 * 4096 + 2 * 2048 * 512, norms 2 * 128 + 2 * 2048, router 128 * 2048 and
    128 experts of 3 * 2048 * 768."""
    layer = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128 + 2 * 2048 + 128 * 2048 + 128 * 3 * 2048 * 768
    assert qwen.layer == layer
    assert qwen.parameters == 48 * layer + 2 * 151936 * 2048 + 2048 == 30_532_122_624
    assert qwen.active == qwen.parameters - 48 * 120 * 3 * 2048 * 768 == 3_353_032_704
    assert qwen.multiplied == qwen.active - 151936 * 2048
    assert kv_bytes(qwen, 2) == 2 * 48 * 4 * 128 * 2 == 98_304


def test_memory_of_weights_gradients_and_optimizer_is_split_over_the_ranks(qwen: ModelShape) -> None:
    c = config(
        learner={"ranks": 8, "micro_tokens": 1024, "activation_checkpointing": True}, model={"precision": "bfloat16"}
    )
    sizes = {line.what: line.size for line in training(c, qwen, 80 * GIB).lines}
    assert sizes["weights, float32"] == sizes["gradients, float32"] == 4 * qwen.parameters // 8
    assert sizes["optimizer, two moments"] == qwen.parameters
    assert sizes["gathered: two layers"] == 2 * 2 * qwen.layer
    one = 4 * 2048 * 48 + layer_activations(qwen, 2) + 8 * 2 * (4 * 768 + 2048)
    assert sizes["activations, 1024 tokens"] == 1024 * one
    assert sizes["mask of shared prompts"] == 1024 * 1024 * 5


def test_the_flops_of_an_update_are_six_for_each_weight_and_token(qwen: ModelShape) -> None:
    c = config(agent={"max_context_tokens": 1024}, rollout={"max_lag": 0}, learner={"router_loss": 0.0})
    flops = update_flops(c, qwen, 1000)
    assert flops["training"] == 3 * 1000 * (2 * qwen.multiplied + 4 * 48 * 4096 * 512)
    assert flops["pi_old"] == 0
    lagging = update_flops(config(agent={"max_context_tokens": 1024}), qwen, 1000)
    assert lagging["pi_old"] == lagging["training"] / 3


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_a_layer_keeps_for_its_backward_is_as_planned(kind: str, precision: torch.dtype) -> None:
    """Measured: every storage that the forward saves, weights and their rounded copies left out. Within a percent."""
    torch.manual_seed(0)

    def kept(layers: int, checkpointing: bool = False) -> tuple[int, ModelShape]:
        if kind == "dense":
            model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=layers))
        else:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, num_hidden_layers=layers))
            model.set_experts_implementation("ale")
        if checkpointing:
            checkpoint_activations(decoder_layers(model))
        return saved(model.eval(), precision), shape_of(model.config)

    (one, _), (three, shape) = kept(1), kept(3)
    planned = layer_activations(shape, precision.itemsize)
    assert (three - one) / 2 / 512 == pytest.approx(planned, rel=0.01)
    (one, _), (three, _) = kept(1, checkpointing=True), kept(3, checkpointing=True)
    assert (three - one) / 2 / 512 == pytest.approx(4 * shape.width, rel=0.01)


def saved(model: Any, precision: torch.dtype) -> int:
    """Bytes that the forward of four sequences of 128 tokens saves for the backward."""
    from ale.kernels import register_experts

    register_experts()
    model.set_attn_implementation("sdpa")
    tokens = [Array.of(np.random.default_rng(n).integers(0, 300, 128), "int32") for n in range(4)]
    (batch,) = split(tokens, [(Chunk(64, 128, "answer"),)] * 4, 10_000)
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    shapes |= {(8, 128, 192)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action_logp(model, batch, 1.0, precision=precision)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_weights_gradients_and_optimizer_are_as_large_as_planned(nano: Any, nano_tokenizer: Any) -> None:
    ring = WeightRing(create_memory(), Layout.of(nano, 3))
    learner = Learner(nano, nano_tokenizer, ring, objective("ipa"), LearnerSettings())
    shown = Demonstration(Array.of(range(10, 40), "int32"), (Chunk(5, 30, "answer"),))
    learner.imitate([shown], 1e-3)
    sizes = {line.what: line.size for line in training(config(), shape_of(nano.config), GIB).lines}
    parameters = list(nano.parameters())
    assert sizes["weights, float32"] == sum(p.nbytes for p in parameters)
    assert sizes["gradients, float32"] == sum(p.grad.nbytes for p in parameters)
    moments = [state[key] for state in learner.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sizes["optimizer, two moments"] == sum(m.nbytes for m in moments)
    assert ring.layout.slots * ring.layout.slot_bytes == pytest.approx(3 * sizes["weights, float32"], rel=0.01)


def test_eight_gpus_train_and_sample_the_thirty_billion(qwen: ModelShape) -> None:
    made = plan(load(ROOT / "examples" / "qwen3-30b-a3b.toml"), qwen, EIGHT)
    assert made.fits
    train, generate = made.phases
    assert 65 * GIB < train.total <= train.limit == 76 * GIB
    assert generate.total <= generate.limit
    assert made.engines * made.tensor_parallel == 8
    # 45.8 GB of weights and moments stay: 61 GB of weights in bfloat16 fit beside them in four parts, not in two.
    assert made.tensor_parallel == 4
    assert made.bottleneck in made.seconds
    assert made.host[0].size == 3 * 4 * qwen.parameters


def test_what_does_not_fit_is_said_with_what_would(qwen: ModelShape) -> None:
    base = load(ROOT / "examples" / "qwen3-30b-a3b.toml")
    long = plan(load(ROOT / "examples" / "qwen3-30b-a3b.toml", ["agent.max_context_tokens=65536"]), qwen, EIGHT)
    assert not long.fits
    (said,) = [r for r in long.remarks if "training does not fit" in r]
    fits = int(re.search(r"(\d+) tokens in a micro-batch would", said)[1])  # type: ignore[index]
    assert "max_context_tokens" in said
    limit = 76 * GIB
    for tokens, well in ((fits, True), (fits + 1, False)):
        c = config(
            model={"precision": "bfloat16"},
            agent={"max_context_tokens": tokens},
            learner={"ranks": 8, "micro_tokens": tokens, "activation_checkpointing": True},
        )
        assert training(c, qwen, limit).fits == well
    four = plan(base, qwen, Devices("cuda", 4, KNOWN[80]))
    assert not four.fits
    assert any("whatever the batch" in r for r in four.remarks)


def test_adapters_need_neither_gradients_nor_moments_of_the_weights(qwen: ModelShape) -> None:
    base = {"model": {"precision": "bfloat16"}, "learner": {"ranks": 8, "lora_rank": 16, "device": "cuda"}}
    sizes = {line.what: line.size for line in training(config(**base), qwen, GIB).lines}
    # q, k, v and o: rank 16 times in + out, in 48 layers
    changed = 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert sizes["gradients, float32"] == 4 * changed // 8
    assert sizes["weights, float32"] == 4 * (qwen.parameters + changed) // 8


def test_a_machine_without_gpus_is_planned_as_one(nano: Any) -> None:
    machine = Devices("cpu", 1, Device("2 cores", 24 * GIB, 2 * 106e9, 25e9))
    made = plan(load(ROOT / "examples" / "nano.toml"), shape_of(nano.config), machine)
    assert made.fits
    assert (made.engines, made.tensor_parallel) == (1, 1)
    (phase,) = made.phases
    assert {"KV cache, 48 sequences", "weight ring, 3 versions", "weights, float32"} <= {
        line.what for line in phase.lines
    }


def test_the_command_prints_the_plan_without_weights_and_runs_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    args = ["train", "examples/qwen3-30b-a3b.toml", "--dry-run", "--set", f"runs_dir={tmp_path}"]
    done = CliRunner().invoke(app, [*args, "--devices", "8x80"])
    assert done.exit_code == 0, done.output
    for said in (
        "30.5B parameters, 3.35B active",
        "2 engines of 4 GPUs",
        "training, each GPU",
        "KV cache",
        "bottleneck",
    ):
        assert said in done.output
    assert "not yet run on a GPU" in done.output
    assert list(tmp_path.iterdir()) == []
    tight = CliRunner().invoke(app, [*args, "--devices", "2x80"])
    assert tight.exit_code == 1
    assert "it does not fit" in tight.output


@pytest.mark.parametrize("text", ["8", "8x", "0x80", "8x80x2"])
def test_devices_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="eight GPUs of 80 GB"):
        parse_devices(text)


def test_of_unknown_devices_there_is_memory_and_no_time(qwen: ModelShape) -> None:
    made = plan(load(ROOT / "examples" / "qwen3-30b-a3b.toml"), qwen, parse_devices("8x96"))
    assert made.fits
    assert made.bottleneck is None


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing(qwen: ModelShape) -> None:
    assert activations(qwen, 2000, 2, True) == 2 * activations(qwen, 1000, 2, True)
    assert activations(qwen, 1000, 2, True) < activations(qwen, 1000, 2, False) / 8
