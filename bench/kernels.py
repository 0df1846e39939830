"""The kernels against what torch offers: `python -m bench.kernels [part of a name]`, on CUDA where there is one.

`TRITON_INTERPRET=1 python -m bench.kernels` walks the same script over the Triton kernels at toy size, without a GPU:
its checks count, its times mean nothing and are not written.

Each operation has a module with `check(bench)`, which compares with the reference, and `time(bench)`, and a result file
of its own. The rates of the device, a copy and one large product, are measured first; a row shows its share of them.
CPU figures are processor time of one thread, so that a busy neighbour does not decide them, where a module does not ask
for more threads.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch

from bench import kernels_chunk_advantage, kernels_grouped_gemm, kernels_linear_logprob, roofline
from bench.harness import Benchmark, benchmark

OPERATIONS: tuple[ModuleType, ...] = (kernels_chunk_advantage, kernels_grouped_gemm, kernels_linear_logprob)


def main() -> None:
    torch.manual_seed(0)
    wanted = [module for module in OPERATIONS if not sys.argv[1:] or sys.argv[1] in module.__name__]
    if os.environ.get("TRITON_INTERPRET") == "1":
        run_at_toy_size(wanted)
        return
    for module in wanted:
        torch.set_num_threads(module.THREADS)
        roofline.forget()
        with benchmark(module.__name__.removeprefix("bench."), pairs=module.PAIRS) as bench:
            module.check(bench)
            bench.rate(
                f"roofline/copy/{module.THREADS} threads",
                ours=lambda: roofline.copy_rate() / 1e9, baseline=None, against=None, unit="GB/s",
            )  # fmt: skip
            for dtype in module.DTYPES:
                bench.rate(
                    f"roofline/product/{str(dtype).removeprefix('torch.')}/{module.THREADS} threads",
                    ours=lambda d=dtype: roofline.product_rate(d) / 1e9, baseline=None, against=None, unit="GFLOP/s",
                )  # fmt: skip
            module.time(bench)


def run_at_toy_size(wanted: list[ModuleType]) -> None:
    torch.set_num_threads(1)
    bench = Benchmark("kernels at toy size, interpreted", pairs=1)
    _shrink()
    for module in wanted:
        module.check(bench)
    for module in wanted:
        module.time(bench)
    print(f"{len(bench.rows)} rows ran")


def _shrink() -> None:
    """Toy shapes, and CPU tensors sent to the kernels as if on an H100."""
    import ale.kernels.moe
    from ale.kernels.device import Chip
    from ale.kernels.grouped_gemm import op as grouped_gemm_op
    from ale.kernels.linear_logprob import op as linear_logprob_op

    # chunk_advantage takes its kernels by itself when Triton interprets
    for module in (ale.kernels.moe, grouped_gemm_op, linear_logprob_op):
        module.chip_of = lambda _: Chip((9, 0), processors=4)  # type: ignore[attr-defined]
    roofline.COPIED, roofline.SIDE = 1024, 32
    kernels_chunk_advantage.REPEATS = 1
    kernels_chunk_advantage.SIZE = kernels_chunk_advantage.CHECKED = (600, 8, 4)
    kernels_grouped_gemm.SHAPES = ((40, 4, 16, 24, True), (33, 3, 32, 16, False))
    kernels_grouped_gemm.LAYERS = ((16, 16, 4, 2),)
    kernels_grouped_gemm.TOKENS = (16,)
    kernels_linear_logprob.CHECKED = (30, 16, 300)
    kernels_linear_logprob.T, kernels_linear_logprob.D, kernels_linear_logprob.V = 20, 16, 300


if __name__ == "__main__":
    main()
