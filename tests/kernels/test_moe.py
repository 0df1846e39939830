"""The MoE layer, the experts backend of transformers and routing replay, on tiny models of the real architectures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ale.kernels import linear_logprob, moe_experts, register_experts
from ale.kernels.moe import STREAM_ROWS, cpu_path, sort_by_expert
from ale.kernels.routing_replay import NOT_RECORDED, record_routing, replay_routing

from .conftest import chips_and_types

transformers = pytest.importorskip("transformers")
register_experts()

T, D, WIDTH, E, J = 24, 16, 12, 6, 2


def moe_reference(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token and one choice at a time."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for j in range(experts.shape[1]):
            gate, up = (gate_up[experts[t, j]] @ x[t]).chunk(2)
            y = y + weights[t, j] * (down[experts[t, j]] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def layer(tokens: int = T, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, experts, weights, gate_up, down; expert 1 gets no token."""
    choice = torch.stack([torch.randperm(E - 1)[:J] for _ in range(tokens)]) if tokens else torch.zeros(0, J).long()
    experts = torch.where(choice == 1, E - 1, choice)
    weights = torch.rand(tokens, J, dtype=dtype)
    x, gate_up, down = (
        torch.randn(tokens, D, dtype=dtype),
        torch.randn(E, 2 * WIDTH, D) / 4,
        torch.randn(E, D, WIDTH) / 4,
    )
    return x, experts, weights, gate_up.to(dtype), down.to(dtype)


def y_and_gradients(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))]


@pytest.mark.parametrize("stream_rows", [0, 10**6], ids=["expert by expert", "grouped"])
def test_the_layer_equals_one_token_at_a_time(stream_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.kernels.moe.STREAM_ROWS", stream_rows)
    inputs = layer()
    for ours, expected in zip(
        y_and_gradients(moe_experts, inputs), y_and_gradients(moe_reference, inputs), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(moe_experts(*inputs), moe_reference(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stream_rows", [0, 10**6], ids=["expert by expert", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_close_to_fp32(dtype: torch.dtype, stream_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.kernels.moe.STREAM_ROWS", stream_rows)
    inputs = layer(dtype=dtype)
    wide = tuple(t.float() if t.is_floating_point() else t for t in inputs)
    for ours, expected in zip(y_and_gradients(moe_experts, inputs), y_and_gradients(moe_reference, wide), strict=True):
        assert ours.dtype is dtype
        assert (ours.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("stream_rows", [0, 10**6], ids=["expert by expert", "grouped"])
def test_the_layer_passes_gradcheck_in_float64(stream_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.kernels.moe.STREAM_ROWS", stream_rows)
    x, experts, weights, gate_up, down = layer(5, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, weights, *w: moe_experts(x, experts, weights, *w), leaves, fast_mode=True)


@pytest.mark.parametrize(("chip", "dtype"), chips_and_types(torch.float32, torch.float16))
def test_the_layer_on_the_kernels_equals_one_token_at_a_time(
    dtype: torch.dtype, chip: tuple[int, int], use_kernels: Any
) -> None:
    inputs = layer(dtype=dtype)
    wide = tuple(t.float() if t.is_floating_point() else t for t in inputs)
    expected = y_and_gradients(moe_reference, wide)
    use_kernels(chip)
    bound = 1e-5 if dtype is torch.float32 else 5e-3
    for ours, reference in zip(y_and_gradients(moe_experts, inputs), expected, strict=True):
        assert (ours.float() - reference).abs().max() <= bound * reference.abs().max()


def test_frozen_weights_get_no_gradient_and_x_the_same() -> None:
    x, experts, weights, gate_up, down = layer()
    x.requires_grad_()
    (alone,) = torch.autograd.grad(moe_experts(x, experts, weights, gate_up, down).sum(), [x])
    gate_up.requires_grad_()
    together, _ = torch.autograd.grad(moe_experts(x, experts, weights, gate_up, down).sum(), [x, gate_up])
    torch.testing.assert_close(alone, together)


def test_no_tokens_give_no_rows() -> None:
    y, *grads = y_and_gradients(moe_experts, layer(0))
    assert y.shape == (0, D)
    assert all(not grad.any() for grad in grads)


def test_the_slots_are_sorted_by_expert_in_order_of_tokens() -> None:
    order, ends = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert order.tolist() == [1, 2, 0, 4, 3, 5]
    assert ends.tolist() == [2, 2, 4, 6, 6]


def test_large_batches_go_expert_by_expert() -> None:
    assert cpu_path(64 * 2, 8) == "grouped"
    assert cpu_path(STREAM_ROWS * 8, 8) == "stream"


@pytest.mark.parametrize("experts", [[[0, E]], [[-1, 0]]], ids=["beyond the last", "negative"])
def test_experts_out_of_range_are_refused(experts: list[list[int]]) -> None:
    x, _, weights, gate_up, down = layer(1)
    with pytest.raises(ValueError, match=rf"\[0, {E}\)"):
        moe_experts(x, torch.tensor(experts), weights, gate_up, down)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    x, experts, weights, gate_up, down = layer()
    for inputs, message in (
        ((x, experts, weights, gate_up[:, :-1], down), "gate_up"),
        ((x, experts, weights, gate_up, down.mT), "down"),
        ((x, experts[:-1], weights, gate_up, down), "experts and weights"),
        ((x, weights, weights, gate_up, down), "integer experts"),
        ((x.double(), experts, weights, gate_up, down), "one floating-point dtype"),
        ((x.int(), experts, weights, gate_up.int(), down.int()), "one floating-point dtype"),
        ((x, experts.to("meta"), weights, gate_up, down), "experts on cpu"),
        ((x, experts, weights, gate_up, down.to("meta")), "down on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_experts(*inputs)


def tiny(kind: str, **changes: Any) -> nn.Module:
    common = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    specific = {
        "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True},
        "Mixtral": {"num_local_experts": 8},
        "GptOss": {"num_local_experts": 8, "sliding_window": 16},
        "DeepseekV3": {
            "n_routed_experts": 8, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "head_dim": 8,
        },
    }[kind]  # fmt: skip
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**common | specific | changes)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # wide enough that experts differ
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


ARCHITECTURES = ("Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_transformers_model_gives_the_same_logits_and_gradients(kind: str) -> None:
    model = tiny(kind)
    tokens = torch.randint(3, 64, (2, 12))
    results = []
    for implementation in ("eager", "ale"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def losses(implementation: str, *, head: str, steps: int = 20) -> list[float]:
    """The loss curve of a tiny Qwen3-MoE on fixed data, its log-probabilities from all logits or from the op."""
    model = tiny("Qwen3Moe").train()
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(2)
    curve = []
    for _ in range(steps):
        tokens = torch.randint(3, 64, (4, 16))
        tokens[:, 1::2] = tokens[:, ::2]  # every second token can be learnt
        if head == "op":
            hidden = model.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
            logp = linear_logprob(hidden, model.lm_head.weight, tokens[:, 1:].flatten())
        else:
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
            logp = torch.log_softmax(logits, -1).gather(1, tokens[:, 1:].reshape(-1, 1))
        loss = -logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_a_model_trains_identically_on_ale_and_eager_and_with_linear_logprob() -> None:
    eager = losses("eager", head="logits")
    assert eager[-1] < eager[0] - 0.2
    assert losses("ale", head="logits") == pytest.approx(eager, abs=1e-4)
    assert losses("ale", head="op") == pytest.approx(eager, abs=1e-4)


def test_experts_of_another_rank_add_nothing() -> None:
    model = tiny("Qwen3Moe")
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    here = torch.tensor([[0, 7]] * 5)
    model.set_experts_implementation("ale")
    expected = experts(x, here, weights * torch.tensor([1.0, 0.0]))
    experts._is_expert_parallel = True
    torch.testing.assert_close(experts(x, torch.tensor([[0, 8]] * 5), weights), expected)


# --- routing replay ------------------------------------------------------------------------------------------------


def expert_layers(model: nn.Module) -> int:
    return sum(hasattr(module, "_is_expert_parallel") for module in model.modules())


def any_choice(layers: int, batch: int, length: int) -> Tensor:
    return torch.rand(layers, batch, length, 8).topk(2).indices


def new_token_logps(model: nn.Module, tokens: Tensor, new: int) -> Tensor:
    logits = model(tokens[:, :-1]).logits[:, -new:].float()
    return torch.log_softmax(logits, -1).gather(2, tokens[:, -new:, None])[..., 0]


@torch.no_grad()
def sample(model: nn.Module, prompt: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy decoding with a cache by an engine that resolves every near-tie its own way, here at random.

    Tokens, log-probabilities of the new ones, and the recorded experts [L, B, S - 1, J].
    """
    batch, layers = prompt.shape[0], expert_layers(model)
    tokens, step, cache = prompt, prompt, None
    logps, experts = [], []
    for _ in range(new):
        choice = any_choice(layers, batch, step.shape[1])
        with replay_routing(model, choice), record_routing(model) as routing:
            out = model(step, cache=cache, use_cache=True)
        experts.append(routing.take())
        assert torch.equal(experts[-1].long(), choice)
        cache = out.cache
        logp = torch.log_softmax(out.logits[:, -1].float(), -1)
        step = logp.argmax(-1, keepdim=True)
        logps.append(logp.gather(1, step))
        tokens = torch.cat([tokens, step], 1)
    return tokens, torch.cat(logps, 1), torch.cat(experts, 2)


@pytest.mark.parametrize("implementation", ["ale", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_replay_matches_the_sampling_forward_where_the_free_forward_does_not(kind: str, implementation: str) -> None:
    model = tiny(kind)
    model.set_experts_implementation("ale")
    new = 5
    tokens, sampled, experts = sample(model, torch.randint(3, 64, (3, 6)), new)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        free = new_token_logps(model, tokens, new)
        with replay_routing(model, experts):
            replayed = new_token_logps(model, tokens, new)
        again = new_token_logps(model, tokens, new)
    assert (free - sampled).abs().max() > 1e-3
    torch.testing.assert_close(replayed, sampled, rtol=0, atol=1e-5)
    assert torch.equal(again, free), "the replay outlived its context"


def test_a_recorded_generation_replays_to_itself_with_unrun_positions_left_to_the_router() -> None:
    model = tiny("Qwen3Moe")
    model.set_experts_implementation("ale")
    prompt = torch.randint(3, 64, (3, 6))
    with torch.no_grad(), record_routing(model) as routing:
        tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    experts = routing.take()
    assert experts.shape == (2, 3, tokens.shape[1] - 1, 2)  # the last token was never run
    unrun = torch.full_like(experts[:, :, :1], NOT_RECORDED)
    with torch.no_grad(), record_routing(model) as free:
        expected = model(tokens).logits
    with torch.no_grad(), record_routing(model) as replayed, replay_routing(model, torch.cat([experts, unrun], 2)):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(replayed.take()[:, :, -1], free.take()[:, :, -1])


def test_the_router_learns_from_the_replayed_choice_through_checkpointing() -> None:
    model = tiny("Qwen3Moe").train()
    model.set_experts_implementation("ale")
    tokens = torch.randint(3, 64, (2, 7))
    experts = any_choice(2, 2, 7)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with replay_routing(model, experts):
            model(tokens, use_cache=False).logits.square().mean().backward()
        grads.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_a_replay_that_does_not_fit_is_refused() -> None:
    model = tiny("Qwen3Moe")
    tokens = torch.randint(3, 64, (2, 7))
    for experts, message in (
        (any_choice(3, 2, 7), r"\[L = 2, B, S, J\]"),
        (any_choice(2, 2, 7) + 1, r"\[0, 8\) or -1"),
    ):
        with pytest.raises(ValueError, match=message), replay_routing(model, experts):
            pass
    with pytest.raises(ValueError, match=r"recorded \(2, 6\)"), replay_routing(model, any_choice(2, 2, 6)):
        model(tokens)
    three = torch.rand(2, 2, 7, 8).topk(3).indices
    with pytest.raises(ValueError, match="3 of 8 experts"), replay_routing(model, three):
        model(tokens)
    with pytest.raises(ValueError, match="experts"), record_routing(nn.Linear(2, 2)):
        pass


def test_a_record_without_forwards_or_of_mixed_batches_is_refused() -> None:
    model = tiny("Qwen3Moe")
    with record_routing(model) as routing, torch.no_grad():
        with pytest.raises(ValueError, match="got none"):
            routing.take()
        model(torch.randint(3, 64, (2, 3)))
        model(torch.randint(3, 64, (1, 3)))
        with pytest.raises(ValueError, match=r"sizes \[1, 2\]"):
            routing.take()
