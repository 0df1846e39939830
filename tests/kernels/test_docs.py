"""The examples of docs/kernels.md run as they stand, and none is longer than ten lines or so."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, Any]:
    """What a trainer has at hand where an example begins."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    old_logp = -torch.rand(9)
    return {
        "torch": torch,
        "path": tmp_path,
        "model": model,
        "input_ids": torch.randint(3, 64, (1, 10)),
        "prompt": torch.randint(3, 64, (2, 6)),
        "logp": (old_logp + 0.1).requires_grad_(),
        "old_logp": old_logp,
        "sampled_logp": old_logp - 0.01,
        "advantage": torch.randn(9),
        "x": torch.randn(12, 32),
        "router": torch.nn.Linear(32, 4),
        "gate_up": torch.randn(4, 32, 32),
        "down": torch.randn(4, 32, 16),
        "w": torch.randn(3, 32, 8),
        "ends": torch.tensor([5, 5, 12]),
        "policy_loss": lambda logits: logits.square().mean(),
    }


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=lambda n: EXAMPLES[n].splitlines()[0])
def test_an_example_runs_as_it_stands(number: int, surroundings: dict[str, Any]) -> None:
    code = EXAMPLES[number]
    before = dict(surroundings)
    exec(compile(code, f"{PAGE.name}, example {number}", "exec"), surroundings)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    if ".backward()" in code:
        leaves = [surroundings["logp"], *surroundings["model"].parameters()]
        assert any(leaf.is_leaf and leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)
    made = [v for n, v in surroundings.items() if n not in before and isinstance(v, Tensor) and v.is_floating_point()]
    assert all(tensor.isfinite().all() for tensor in made)


def test_the_page_shows_all_three_operations() -> None:
    for name in ("chunk_advantage", "grouped_gemm", "linear_logprob", "moe_experts", "register_experts"):
        assert any(re.search(rf"import .*\b{name}\b", code) for code in EXAMPLES), name
