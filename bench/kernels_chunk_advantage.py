"""`chunk_advantage` forward and backward against what one would write in torch.

- `vectorised`: log-ratios, `index_add_` into chunks, `exp`, compare, clip, gather back, multiply and sum, under
  autograd. It starts from the same offsets as we do.
- `vectorised_ids`: the same with the chunk of each token handed to it, outside the clock.
- `loop`: the reference, one chunk after the other; on a CPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ale.kernels.chunk_advantage import Weighting, chunk_advantage
from ale.kernels.chunk_advantage.reference import chunk_advantage_reference
from bench.harness import Benchmark
from bench.measure import DEVICE, milliseconds
from bench.roofline import Work

PAIRS, THREADS = 7, 1
DTYPES = (torch.float32,)
SIZE = (262_144, 4_096, 256)  # tokens, chunks, trajectories
CHECKED = (4_096, 64, 16)
REPEATS = 15
RULE = Weighting(gamma=1.0)
"""The torch versions do not discount."""

Problem = dict[str, Tensor]


def problem(tokens: int, chunks: int, trajectories: int) -> Problem:
    """Tokens on the device; offsets and advantages on the CPU, where they come from."""
    generator = torch.Generator().manual_seed(0)
    inner = (torch.randperm(tokens - 1, generator=generator)[: chunks - 1] + 1).sort().values
    logp = -torch.rand(tokens, generator=generator)
    old = logp + 0.1 * torch.randn(tokens, generator=generator)
    return {
        "logp_T": logp.to(DEVICE),
        "logp_old_T": old.to(DEVICE),
        "logp_mu_T": (old + torch.randn(tokens, generator=generator)).to(DEVICE),
        "chunk_offsets": torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])]),
        "trajectory_offsets": torch.arange(trajectories + 1) * (chunks // trajectories),
        "advantage_N": torch.randn(trajectories, generator=generator),
    }


def op_gradient(given: Problem, op: Callable[..., Any] = chunk_advantage) -> Tensor:
    logp = given["logp_T"].detach().requires_grad_()
    op(**{**given, "logp_T": logp}, weighting=RULE).loss.backward()
    assert logp.grad is not None
    return logp.grad


def chunk_ids(given: Problem) -> tuple[Tensor, Tensor, Tensor]:
    lengths = given["chunk_offsets"].diff().to(DEVICE)
    trajectory = torch.repeat_interleave(given["trajectory_offsets"].diff().to(DEVICE))
    return lengths, torch.repeat_interleave(lengths), trajectory


def vectorised_gradient(given: Problem, ids: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    lengths, chunk, trajectory = chunk_ids(given) if ids is None else ids
    logp = given["logp_T"].detach().requires_grad_()
    log_ratio = logp.detach() - given["logp_old_T"]
    log_mismatch = given["logp_old_T"] - given["logp_mu_T"]
    zeros = torch.zeros(len(lengths), device=DEVICE)
    ratio = (zeros.index_add(0, chunk, log_ratio) / lengths).exp()
    mask = (zeros.index_add(0, chunk, log_mismatch) / lengths).exp() <= RULE.mask_high
    advantage = given["advantage_N"].to(DEVICE)[trajectory]
    weight = torch.where(advantage > 0, advantage, ratio.clamp(0.0, 1.0) * advantage) * mask
    loss = -(weight[chunk] * logp).sum() / (lengths * mask).sum()
    loss.backward()
    assert logp.grad is not None
    return logp.grad


def check(bench: Benchmark) -> None:
    small, given = problem(*CHECKED), problem(*SIZE)
    on_cpu = {name: tensor.cpu() for name, tensor in small.items()}
    bench.check(
        "the gradient of chunk_advantage is that of the loop",
        lambda: _close(op_gradient(small), op_gradient(on_cpu, chunk_advantage_reference)),
    )
    bench.check("and that of the vectorised version", lambda: _close(op_gradient(given), vectorised_gradient(given)))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-9)


def time(bench: Benchmark) -> None:
    given = problem(*SIZE)
    ids = chunk_ids(given)
    tokens, chunks, _ = SIZE
    # logp, old and mu are read, the gradient is written; 12 operations a token are nothing beside that
    work = Work(12.0 * tokens, 16.0 * tokens, torch.float32)
    baselines: dict[str, tuple[str, Callable[[], object], int]] = {
        "vectorised": ("torch, index_add", lambda: vectorised_gradient(given), REPEATS),
        "vectorised_ids": ("torch, index_add, ids given", lambda: vectorised_gradient(given, ids), REPEATS),
    }
    if DEVICE.type == "cpu":
        loop: Callable[[], object] = lambda: op_gradient(given, chunk_advantage_reference)  # noqa: E731
        baselines["loop"] = ("loop over chunks", loop, 1)
    for name, (against, baseline, repeats) in baselines.items():
        bench.latency(
            f"chunk_advantage/{name}/{tokens} tokens {chunks} chunks",
            ours=lambda: milliseconds(lambda: op_gradient(given), most=REPEATS),
            baseline=lambda b=baseline, n=repeats: milliseconds(b, most=n),
            against=against,
            unit="ms",
            figures=work.figures,
        )
