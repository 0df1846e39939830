"""`linear_logprob` against the version that materialises the logits: time and peak memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ale.kernels import linear_logprob
from ale.kernels.linear_logprob.reference import linear_logprob_reference
from bench.harness import Benchmark
from bench.measure import DEVICE, milliseconds, peak_mib
from bench.roofline import Work

PAIRS = 2
THREADS = os.cpu_count() or 1
"""A call takes ten seconds and more on one thread of a CPU: few pairs, on all of them, in wall time."""

T, D, V = 2048, 1024, 151_936
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
DTYPES = (DTYPE,)
CHECKED = (300, 256, 5000)


def problem(tokens: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    make = {"dtype": DTYPE, "device": DEVICE}
    h = torch.randn(tokens, hidden, **make).requires_grad_()
    w = (torch.randn(vocabulary, hidden, **make) / hidden**0.5).requires_grad_()
    return h, w, torch.randint(vocabulary, (tokens,), device=DEVICE)


def materialised(h: Tensor, w: Tensor, token: Tensor) -> Tensor:
    return torch.log_softmax((h @ w.t()).float(), -1).gather(1, token[:, None])[:, 0]


def by_liger(h: Tensor, w: Tensor, token: Tensor) -> Tensor:
    """Liger's fused loss; it returns the negative of what the others return, per token."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(h, w, token, reduction="none")
    return -loss


def calls(function: Callable[..., Tensor], case: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    h, w, _ = case

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*case)

    return {"forward": forward, "training": lambda: torch.autograd.grad(function(*case).mean(), [h, w])}


def check(bench: Benchmark) -> None:
    bench.check("linear_logprob equals the reference, forward and both gradients", _equal)


def _equal() -> bool:
    case = problem(*CHECKED)
    results = []
    for function in (linear_logprob, linear_logprob_reference):
        logp = function(*case)
        results.append((logp, *torch.autograd.grad(logp.mean(), case[:2])))
    bound = 1e-4 if DTYPE is torch.float32 else 2e-2
    return all((a - b).abs().max().item() <= bound * b.abs().max().item() for a, b in zip(*results, strict=True))


def time(bench: Benchmark) -> None:
    case = problem(T, D, V)
    row = f"{T}x{D}x{V}/{str(DTYPE).removeprefix('torch.')}"
    memory(bench, case, row)
    ours = calls(linear_logprob, case)
    baselines = {"materialised logits": calls(materialised, case)}
    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        baselines["Liger's fused linear cross entropy"] = calls(by_liger, case)
    for mode in ours:
        for name, theirs in baselines.items():
            bench.latency(
                f"linear_logprob/{mode}/{row}",
                ours=lambda m=mode: milliseconds(ours[m]),
                baseline=lambda m=mode, t=theirs: milliseconds(t[m]),
                against=name,
                unit="ms",
                # the logits once, and for training their two gradients: recomputing them is our own affair
                figures=Work(
                    (1 if mode == "forward" else 3) * 2.0 * T * D * V, (T + V) * D * DTYPE.itemsize, DTYPE
                ).figures,
            )


def memory(bench: Benchmark, case: tuple[Tensor, Tensor, Tensor], row: str) -> None:
    ours = calls(linear_logprob, case)
    logits_mib = T * V * 4 / 2**20
    for mode in ours:
        results_mib = T * 4 / 2**20 if mode == "forward" else sum(t.numel() * t.itemsize for t in case[:2]) / 2**20
        beyond_mib = max(peak_mib(ours[mode]) - results_mib, 1.0)  # the same every time: one call is enough
        bench.latency(
            f"linear_logprob/memory/{mode}/{row}",
            ours=lambda mib=beyond_mib: mib,
            baseline=lambda: logits_mib,
            against="the fp32 logits alone",
            unit="MiB beyond inputs and results",
        )
