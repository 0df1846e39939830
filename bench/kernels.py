"""The kernels against what torch offers: `python -m bench.kernels [part of a name]`, on CUDA where there is one.

Each operation has a module with `check(bench)`, which compares with the reference, and `time(bench)`. All checks run
before anything is timed. CPU figures are of one thread, so that a busy neighbour does not decide them.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from bench import kernels_grouped_gemm, kernels_linear_logprob
from bench.harness import benchmark

OPERATIONS: tuple[ModuleType, ...] = (kernels_grouped_gemm, kernels_linear_logprob)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wanted = [module for module in OPERATIONS if not sys.argv[1:] or sys.argv[1] in module.__name__]
    with benchmark("kernels", pairs=3) as bench:
        for module in wanted:
            module.check(bench)
        for module in wanted:
            module.time(bench)


if __name__ == "__main__":
    main()
