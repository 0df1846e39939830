"""What the engine puts in the place of a model's modules gives what they gave."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ale.models.load import hidden_states
from ale.policy import experts
from ale.policy.attention import FlatCache, FusedAttention
from ale.policy.engine import Engine
from ale.policy.fused import FusedSwiGLU, flat_hidden_states, fuse
from ale.policy.kv_cache import KVRows

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES | more)),
    "qwen2, with biases": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES | more)),
    "qwen3, with norms of queries and keys": lambda **more: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES | more)),
}


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = KINDS[kind](**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # gains and biases are 1 and 0 at first, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_without_padding_gives_the_states_of_each_row_by_itself(kind: str) -> None:
    model = made(kind)
    prompts = [torch.randint(320, (n,)) for n in (30, 9, 17, 1)]
    with torch.inference_mode():
        expected = [hidden_states(model, input_ids=ids[None]).last_hidden_state[0] for ids in prompts]
        fused = fuse(model, torch.float32)
        assert fused.flat
        store, found = KVRows(model.config, 5, torch.float32), [list[torch.Tensor]() for _ in prompts]
        rows = [3, 0, 4, 1]  # the rows of a step are in any order, and some belong to others
        # prompts alone; some go on by one token and some by many, with row 0 left out; single tokens; one of them.
        for spans in (
            {0: (0, 20), 1: (0, 8), 2: (0, 3), 3: (0, 1)},
            {0: (20, 21), 2: (3, 16)},
            {0: (21, 22), 1: (8, 9), 2: (16, 17)},
            {0: (22, 30)},
        ):
            counts = [end - begin for begin, end in spans.values()]
            cache = FlatCache(store, [rows[i] for i in spans], [begin for begin, _ in spans.values()], counts)
            ids_N = torch.cat([prompts[i][begin:end] for i, (begin, end) in spans.items()])
            states_ND = flat_hidden_states(model, ids_N, cache)
            for i, states in zip(spans, states_ND.split(counts), strict=True):
                found[i].append(states)
    for own, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.cat(ours), own, rtol=1e-4, atol=1e-4)


def test_after_new_weights_what_is_fused_is_made_of_them() -> None:
    old, new = made("llama", intermediate_size=2048), made("llama", intermediate_size=2048)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    fused = fuse(old, torch.float32)
    assert {type(part) for part in fused.parts} >= {FusedAttention, FusedSwiGLU}
    with torch.no_grad():
        for parameter, value in zip(old.parameters(), new.parameters(), strict=True):
            parameter.copy_(value)
    fused.pack()
    ids_N = torch.randint(320, (12,))
    with torch.inference_mode():
        cache = FlatCache(KVRows(old.config, 1, torch.float32), [0], [0], [12])
        ours = flat_hidden_states(old, ids_N, cache)
        torch.testing.assert_close(
            ours, hidden_states(new, input_ids=ids_N[None]).last_hidden_state[0], rtol=1e-4, atol=1e-4
        )


def test_an_attention_that_computes_something_else_is_left_alone() -> None:
    model = made("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **named: tuple(None if x is None else x * 1.01 for x in own(*args, **named))
    assert not fuse(model, torch.float32).flat
    assert not any(isinstance(layer.self_attn.forward, FusedAttention) for layer in model.model.layers)


def test_a_model_with_learned_positions_runs_on_padded_rows(ask: Any, drive: Any, training_logp: Any) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    engine = Engine(model, rows=8)
    assert not engine.fused.flat
    prompts = [list(range(10, 10 + n)) for n in (3, 40, 17, 5)]
    turns = drive(engine, [ask(f"s{i}", prompt, max_tokens=9, seed=i) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        gap = np.abs(training_logp(model, prompt, turns[i]) - turns[i].logp_A.numpy())
        assert gap.max() < 1e-4


@pytest.mark.parametrize("tokens", [1, 7, 48])
def test_all_experts_for_every_token_give_what_the_chosen_ones_give(
    nano: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "SPARE_FLOPS", 1e12)
    module = nano.model.layers[0].mlp.experts
    own, packed = module.forward, experts.PackedExperts(module)
    x_TD = torch.randn(tokens, module.hidden_dim)
    weight_TJ, chosen_TJ = torch.rand(tokens, module.num_experts).softmax(-1).topk(2)
    with torch.inference_mode():
        torch.testing.assert_close(
            packed(x_TD, chosen_TJ, weight_TJ), own(x_TD, chosen_TJ, weight_TJ), rtol=1e-4, atol=1e-5
        )


def test_all_experts_are_computed_only_for_few_tokens_and_small_experts() -> None:
    nano = {"J": 2, "E": 8, "D": 128, "I": 128}
    assert experts.pays(48, **nano)
    assert not experts.pays(192, **nano)
    assert not experts.pays(1, J=8, E=128, D=2048, I=768)
