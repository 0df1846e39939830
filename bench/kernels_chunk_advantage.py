"""`chunk_advantage` forward and backward on the CPU, against what one would write in torch.

`rows(bench)` adds this op's checks and rows to a `Benchmark`, so that one run can hold all kernels.
- `vectorised`: log-ratios, `index_add_` into chunks, `exp`, compare, clip, gather back, multiply and sum, under
  autograd. It starts from the same offsets as we do.
- `vectorised_ids`: the same with the chunk of each token handed to it, outside the clock.
- `loop`: the reference, one chunk after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ale.kernels.chunk_advantage import Weighting, chunk_advantage
from ale.kernels.chunk_advantage.reference import chunk_advantage_reference

TOKENS, CHUNKS, TRAJECTORIES = 262_144, 4_096, 256
REPEATS = 15
# The torch versions do not discount.
RULE = Weighting(gamma=1.0)


def problem(tokens: int = TOKENS, chunks: int = CHUNKS, trajectories: int = TRAJECTORIES) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inner = (torch.randperm(tokens - 1, generator=generator)[: chunks - 1] + 1).sort().values
    logp = -torch.rand(tokens, generator=generator)
    old = logp + 0.1 * torch.randn(tokens, generator=generator)
    return {
        "logp_T": logp,
        "logp_old_T": old,
        "logp_mu_T": old + torch.randn(tokens, generator=generator),
        "chunk_offsets": torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])]),
        "trajectory_offsets": torch.arange(trajectories + 1) * (chunks // trajectories),
        "advantage_N": torch.randn(trajectories, generator=generator),
    }


def op_gradient(given: dict[str, Any], op: Any = chunk_advantage) -> Tensor:
    logp = given["logp_T"].detach().requires_grad_()
    op(**{**given, "logp_T": logp}, weighting=RULE).loss.backward()
    return logp.grad


def chunk_ids(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = given["chunk_offsets"].diff()
    trajectory = torch.repeat_interleave(given["trajectory_offsets"].diff())
    return lengths, torch.repeat_interleave(lengths), trajectory


def vectorised_gradient(given: dict[str, Any], ids: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    lengths, chunk, trajectory = chunk_ids(given) if ids is None else ids
    logp = given["logp_T"].detach().requires_grad_()
    log_ratio = logp.detach() - given["logp_old_T"]
    log_mismatch = given["logp_old_T"] - given["logp_mu_T"]
    ratio = (torch.zeros(len(lengths)).index_add_(0, chunk, log_ratio) / lengths).exp()
    mask = (torch.zeros(len(lengths)).index_add_(0, chunk, log_mismatch) / lengths).exp() <= RULE.mask_high
    advantage = given["advantage_N"][trajectory]
    weight = torch.where(advantage > 0, advantage, ratio.clamp(0.0, 1.0) * advantage) * mask
    loss = -(weight[chunk] * logp).sum() / (lengths * mask).sum()
    loss.backward()
    assert logp.grad is not None
    return logp.grad


def milliseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def close(a: Tensor, b: Tensor) -> bool:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    return True


def rows(bench: Any) -> None:
    """Adds the checks and rows of this op to a `bench.harness.Benchmark`."""
    given, small = problem(), problem(4_096, 64, 16)
    ids = chunk_ids(given)
    bench.check(
        "the gradient is that of the loop",
        lambda: close(op_gradient(small), op_gradient(small, chunk_advantage_reference)),
    )
    bench.check("and that of the vectorised version", lambda: close(op_gradient(given), vectorised_gradient(given)))
    ours = {"ours": lambda: milliseconds(lambda: op_gradient(given)), "unit": "ms"}
    bench.latency(
        "chunk_advantage/vectorised",
        baseline=lambda: milliseconds(lambda: vectorised_gradient(given)),
        against="torch, index_add_",
        **ours,
    )
    bench.latency(
        "chunk_advantage/vectorised_ids",
        baseline=lambda: milliseconds(lambda: vectorised_gradient(given, ids)),
        against="torch, index_add_, ids given",
        **ours,
    )
    bench.latency(
        "chunk_advantage/loop",
        baseline=lambda: milliseconds(lambda: op_gradient(given, chunk_advantage_reference), 1),
        against="loop over chunks",
        **ours,
    )


def main() -> None:
    from bench.harness import benchmark

    with benchmark("kernels_chunk_advantage") as bench:
        rows(bench)


if __name__ == "__main__":
    main()
