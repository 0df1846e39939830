"""The kernels against what torch offers: `python -m bench.kernels [part of a name]`, on CUDA where there is one.

`TRITON_INTERPRET=1 python -m bench.kernels` walks the same script over the Triton kernels at toy size, without a GPU:
its checks count, its times mean nothing and are not written.

Each operation has a module with `rows(bench)`, which first compares with the reference, then times, and a result file
of its own. CPU figures are processor time of one thread, so that a busy neighbour does not decide them.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch

from bench import kernels_grouped_gemm, kernels_linear_logprob
from bench.harness import Benchmark, benchmark

OPERATIONS: tuple[ModuleType, ...] = (kernels_grouped_gemm, kernels_linear_logprob)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wanted = [module for module in OPERATIONS if not sys.argv[1:] or sys.argv[1] in module.__name__]
    if os.environ.get("TRITON_INTERPRET") == "1":
        bench = Benchmark("kernels at toy size, interpreted", pairs=1)
        _shrink()
        for module in wanted:
            module.check(bench)
        for module in wanted:
            module.time(bench)
        print(f"{len(bench.rows)} rows ran")
        return
    for module in wanted:
        with benchmark(module.__name__.removeprefix("bench."), pairs=3) as bench:
            module.rows(bench)


def _shrink() -> None:
    """Toy shapes, and CPU tensors sent to the kernels as if on an H100."""
    import ale.kernels.moe
    from ale.kernels.device import Chip
    from ale.kernels.grouped_gemm import op as grouped_gemm_op
    from ale.kernels.linear_logprob import op as linear_logprob_op

    for module in (ale.kernels.moe, grouped_gemm_op, linear_logprob_op):
        module.chip_of = lambda _: Chip((9, 0), processors=4)  # type: ignore[attr-defined]
    kernels_grouped_gemm.SHAPES = ((40, 4, 16, 24, True), (33, 3, 32, 16, False))
    kernels_grouped_gemm.LAYERS = ((16, 16, 4, 2),)
    kernels_grouped_gemm.TOKENS, kernels_grouped_gemm.ROOFLINE = (16,), (64, 2, 32, 32)
    kernels_linear_logprob.CHECKED = (30, 16, 300)
    kernels_linear_logprob.T, kernels_linear_logprob.D, kernels_linear_logprob.V = 20, 16, 300


if __name__ == "__main__":
    main()
