"""The configurations of `linear_logprob` that `bench.aot` compiles: every tile that `tiles.py` can give, by use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ale.kernels.linear_logprob import kernel, tiles
from bench.aot import MATRIX, TMA, Spec

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CHIPS = (80, 90, 100)


def specs() -> Iterator[Spec]:
    for chip in CHIPS:
        for T in (16, 32, 64, 2048):
            yield _sums(chip, torch.bfloat16, T, entropy=True, tma=chip >= 90)
        for T in (32, 2048):
            yield _sums(chip, torch.float32, T, entropy=True, tma=chip >= 90)
        yield _sums(chip, torch.float16, 2048, entropy=False, tma=chip >= 90)
        for dtype in (torch.bfloat16, torch.float32):
            yield _grad(chip, dtype, 2048, entropy=True, tma=chip >= 90)
        yield _grad(chip, torch.float16, 2048, entropy=False, tma=chip >= 90)
        if chip >= 90:  # strides that TMA does not take
            yield _sums(chip, torch.bfloat16, 2048, entropy=True, tma=False)
            yield _grad(chip, torch.bfloat16, 2048, entropy=True, tma=False)


def _sums(chip: int, dtype: torch.dtype, T: int, *, entropy: bool, tma: bool) -> Spec:
    tile = tiles.sums_tile(T, dtype, (chip // 10, 0))
    arguments = dict.fromkeys(("max_ptr", "sum_ptr", "dot_ptr", "chosen_ptr"), "*fp32") | {"tiles_per_slice": "i32"}
    return _spec("forward", kernel.linear_logprob_kernel, chip, dtype, tile, arguments, {}, entropy, tma)


def _grad(chip: int, dtype: torch.dtype, T: int, *, entropy: bool, tma: bool) -> Spec:
    tile = tiles.grad_tile(T, dtype, (chip // 10, 0), tma=tma)
    arguments = dict.fromkeys(("lse_ptr", "mean_ptr", "dlogp_ptr", "dentropy_ptr"), "*fp32")
    arguments |= {"out_ptr": f"*{TYPES[dtype]}", "begin_v": "i32", "end_v": "i32"}
    constants = {"GROUP_T": tile.group}
    return _spec("logits_grad", kernel.logits_grad_kernel, chip, dtype, tile, arguments, constants, entropy, tma)


def _spec(
    use: str,
    function: Any,
    chip: int,
    dtype: torch.dtype,
    tile: tiles.Tile,
    arguments: dict[str, str],
    constants: dict[str, Any],
    entropy: bool,
    tma: bool,
) -> Spec:
    kind = TYPES[dtype]
    arguments = arguments | {
        "h": f"tensordesc<{kind}[{tile.m}, {tile.k}]>" if tma else f"*{kind}",
        "w": f"tensordesc<{kind}[{tile.n}, {tile.k}]>" if tma else f"*{kind}",
        "token_ptr": "*i64",
        **dict.fromkeys(("T", "V", "D", "stride_ht", "stride_wv"), "i32"),
        "inverse_temperature": "fp32",
    }
    constants = constants | {
        "stride_hd": 1, "stride_wd": 1, "ENTROPY": entropy, "TMA": tma, "UPCAST": False,
        "BLOCK_T": tile.m, "BLOCK_V": tile.n, "BLOCK_D": tile.k,
    }  # fmt: skip
    matrix = () if dtype is torch.float32 else (MATRIX[chip] if tile.m >= 64 else "mma.sync",)
    label = f"linear_logprob/{use}/{'entropy ' if entropy else ''}{'' if tma else 'pointer '}{kind}"
    return Spec(
        f"{label} {tile.m}x{tile.n}x{tile.k}", chip, function, arguments, constants, tile.warps, tile.stages,
        (*matrix, TMA) if tma else matrix, ("D", "stride_ht", "stride_wv", "begin_v"),
    )  # fmt: skip
