"""`grouped_gemm` and the MoE layer on it, against `F.grouped_mm`, the loop over experts and transformers' experts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ale.kernels import grouped_gemm
from ale.kernels.grouped_gemm.reference import grouped_gemm_reference
from ale.kernels.moe import experts_forward
from bench.harness import Benchmark
from bench.measure import DEVICE
from bench.measure import milliseconds as measured
from bench.roofline import Work

PAIRS, THREADS = 7, 1

SHAPES: tuple[tuple[int, int, int, int, bool], ...] = (  # M rows, E experts, K, N, weights stored [E, N, K]
    (4096, 8, 128, 256, True),
    (4096, 16, 256, 512, False),
    (16384, 8, 128, 256, True),
    (256, 16, 512, 1024, False),
    (2048, 16, 1024, 1024, False),
    (2048, 8, 512, 1024, True),
    (512, 64, 512, 512, True),
    (1024, 128, 256, 256, False),
)
if DEVICE.type == "cuda":  # layers of Qwen3-30B-A3B and of models like it, training and decoding
    SHAPES = (
        (65536, 128, 2048, 1536, True),
        (65536, 128, 768, 2048, True),
        (16384, 64, 2048, 2048, False),
        (1024, 128, 2048, 1536, True),
    )
DTYPES = (torch.float32, torch.bfloat16)
LAYERS = ((128, 128, 8, 2), (256, 256, 8, 2), (128, 64, 32, 4))  # D, I, E, J
TOKENS = (16, 32, 64, 256, 1024, 8192)
BASELINES = ("eager", "grouped_mm")


def milliseconds(call: Callable[[], object]) -> float:
    """Short, so that ours and the baseline alternate often."""
    return measured(call, budget_s=0.1)


def problem(M: int, E: int, K: int, N: int, k_major: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, ends and a gradient; rows spread over experts at random."""
    make = {"dtype": dtype, "device": DEVICE}
    x = torch.randn(M, K, **make).requires_grad_()
    w = (torch.randn(E, N, K, **make).mT if k_major else torch.randn(E, K, N, **make)).requires_grad_()
    ends = torch.bincount(torch.randint(E, (M,), device=DEVICE), minlength=E).cumsum(0).int()
    return x, w, ends, torch.randn(M, N, **make)


def by_grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w, offs=ends)


def by_loop(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    bounds = [0, *ends.tolist()]
    return torch.cat([x[b:t] @ w[e] for e, (b, t) in enumerate(pairwise(bounds))])


def calls(function: Callable[..., Tensor], case: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    x, w, ends, dy = case

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x, w, ends)

    return {"forward": forward, "training": lambda: torch.autograd.grad(function(x, w, ends), [x, w], dy)}


def check(bench: Benchmark) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            bench.check(f"grouped_gemm {shape} {dtype} equals the reference", lambda s=shape, d=dtype: _equal(s, d))
    for layer in LAYERS:
        bench.check(f"the MoE layer {layer} equals eager", lambda size=layer: _equal_layer(size))


def _equal(shape: tuple[Any, ...], dtype: torch.dtype) -> bool:
    x, w, ends, dy = problem(*shape, dtype)
    y, expected = grouped_gemm(x, w, ends), grouped_gemm_reference(x, w, ends)
    ours, theirs = (torch.autograd.grad(out, [x, w], dy) for out in (y, expected))
    bound = 1e-4 if dtype is torch.float32 else 2e-2
    pairs = zip((y, *ours), (expected, *theirs), strict=True)
    return all((a - b).abs().max().item() <= bound * b.abs().max().item() for a, b in pairs)


def time(bench: Benchmark) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            case = problem(*shape, dtype)
            ours = calls(grouped_gemm, case)
            others = {"F.grouped_mm": calls(by_grouped_mm, case), "the loop over experts": calls(by_loop, case)}
            for mode in ours:
                M, E, K, N, _ = shape
                best = min(others, key=lambda name, m=mode, o=others: milliseconds(o[name][m]))
                bench.latency(
                    f"grouped_gemm/{mode}/{M}x{E}x{K}x{N}/{str(dtype).removeprefix('torch.')}",
                    ours=lambda m=mode, c=ours: milliseconds(c[m]),
                    baseline=lambda m=mode, b=others[best]: milliseconds(b[m]),
                    against=f"{best}, the better of grouped_mm and the loop",
                    unit="ms",
                    figures=_work(M, E, K, N, dtype, products=1 if mode == "forward" else 3).figures,
                )
    for size in LAYERS:
        for tokens in TOKENS:
            _time_layer(bench, size, tokens)


def _work(M: int, E: int, K: int, N: int, dtype: torch.dtype, products: int) -> Work:
    """Each product of a step reads two of x, w and y and writes the third."""
    return Work(products * 2.0 * M * K * N, products * dtype.itemsize * (M * K + E * K * N + M * N), dtype)


def _layer(D: int, I: int, E: int, J: int, tokens: int) -> tuple[Any, tuple[Tensor, ...]]:  # noqa: E741
    """An experts module as transformers makes it, and its arguments."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=J)
    experts = Qwen3MoeExperts(config).to(DEVICE)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    weights, chosen = torch.rand(tokens, E, device=DEVICE).topk(J)
    x = torch.randn(tokens, D, device=DEVICE)
    return experts, (x.requires_grad_(), chosen, weights.requires_grad_())


def _experts_calls(module: Any, inputs: tuple[Tensor, ...], name: str) -> SimpleNamespace:
    """The decoding forward and a training step of one experts implementation."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    eager = type(module).forward.__wrapped__
    function = {"eager": eager, "grouped_mm": grouped_mm_experts_forward, "ale": experts_forward}[name]
    wanted = [inputs[0], inputs[2], *module.parameters()]

    def decode() -> Tensor:
        with torch.no_grad():
            return function(module, *inputs)

    def train() -> object:
        y = function(module, *inputs)
        return torch.autograd.grad(y, wanted, torch.ones_like(y))

    return SimpleNamespace(decode=decode, train=train)


def _equal_layer(size: tuple[int, int, int, int]) -> bool:
    module, inputs = _layer(*size, tokens=96)
    ours, eager = (_experts_calls(module, inputs, name) for name in ("ale", "eager"))
    pairs = zip((ours.decode(), *ours.train()), (eager.decode(), *eager.train()), strict=True)
    return all((a - b).abs().max().item() <= 1e-4 * b.abs().max().item() for a, b in pairs)


def _time_layer(bench: Benchmark, size: tuple[int, int, int, int], tokens: int) -> None:
    module, inputs = _layer(*size, tokens)
    ours = _experts_calls(module, inputs, "ale")
    theirs = [_experts_calls(module, inputs, name) for name in BASELINES]
    for mode in ("decode",) if tokens <= 64 else ("decode", "train"):
        bench.latency(
            f"grouped_gemm/moe/{mode}/D{size[0]} I{size[1]} E{size[2]} J{size[3]}/{tokens} tokens",
            ours=lambda m=mode: milliseconds(getattr(ours, m)),
            baseline=lambda m=mode: min(milliseconds(getattr(each, m)) for each in theirs),
            against="the better of transformers' eager and grouped_mm",
            unit="ms",
        )
