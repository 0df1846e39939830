"""The configurations of `grouped_gemm` that `bench.aot` compiles: every tile that `tiles.py` can give, by use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ale.kernels.grouped_gemm import kernel, tiles
from bench.aot import MATRIX, TMA, Spec

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LANES_E = 128
CHIPS = (80, 90, 100)


def specs() -> Iterator[Spec]:
    for chip in CHIPS:
        for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
            for rows in (16, 32, 64, 128) if dtype is torch.bfloat16 else (128,):
                yield _gemm(chip, dtype, tf32, rows, "swiglu")
            for use in ("plain", "scatter", "dx"):
                yield _gemm(chip, dtype, tf32, 128, use)
            for use in ("plain", "gather"):
                yield _weight_grad(chip, dtype, tf32, use)
        yield _gemm(chip, torch.float16, False, 128, "plain")
        for use in ("narrow", "unaligned"):
            yield _gemm(chip, torch.bfloat16, False, 128, use)
            yield _weight_grad(chip, torch.bfloat16, False, use)
        yield _swiglu_backward(chip)


def _name(kernel_name: str, use: str, dtype: torch.dtype, tf32: bool, tile: tiles.Tile) -> str:
    precision = "tf32" if tf32 else TYPES[dtype]
    return f"grouped_gemm/{kernel_name}/{use} {precision} {tile.m}x{tile.n}x{tile.k}"


def _gemm(chip: int, dtype: torch.dtype, tf32: bool, rows: int, use: str) -> Spec:
    """`swiglu` and `scatter` are the two products of an MoE layer, `dx` is the gradient of the first.

    `plain` neither gathers nor scatters, `narrow` is N <= 64, `unaligned` has strides that TMA does not take.
    """
    swiglu, scatter = use == "swiglu", use in ("scatter", "dx")
    N = 64 if use == "narrow" else 768
    tile = tiles.gemm_tile(rows * 8, 8, N, dtype, (chip // 10, 0), aligned=use != "unaligned", swiglu=swiglu, tf32=tf32)
    kind, tma = TYPES[dtype], chip >= 90 and use != "unaligned"
    k_major = use in ("swiglu", "scatter")  # as checkpoints store it
    box = f"1, {tile.n}, {tile.k}" if k_major else f"1, {tile.k}, {tile.n}"
    x_tma = tma and not swiglu
    arguments = {
        "x": f"tensordesc<{kind}[{tile.m}, {tile.k}]>" if x_tma else f"*{kind}",
        "w": f"tensordesc<{kind}[{box}]>" if tma else f"*{kind}",
        **dict.fromkeys(("y_ptr", "pre_ptr", "scale_ptr"), f"*{kind}"),
        "ends_ptr": "*i32",
        **dict.fromkeys(("gather_ptr", "scatter_ptr"), "*i64"),
        **dict.fromkeys(("E", "K", "N", "stride_xm", "stride_we", "stride_wn" if k_major else "stride_wk"), "i32"),
    }
    constants: dict[str, Any] = {
        "stride_xk": 1, "stride_wk" if k_major else "stride_wn": 1,
        "TOP_K": 8 if swiglu else 1, "GATHER": swiglu, "SCATTER": scatter, "SCALE": use == "scatter",
        "SWIGLU": swiglu, "STORE_PRE": swiglu, "X_TMA": x_tma, "W_TMA": tma, "W_K_MAJOR": k_major,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group, "LANES_E": LANES_E,
        "PRECISION": "tf32" if tf32 else "ieee", "UPCAST": False,
    }  # fmt: skip
    aligned = () if use == "unaligned" else ("K", "N", "stride_xm", "stride_we", "stride_wn", "stride_wk")
    expects = _expects(chip, dtype, tf32, tile.m, tma)
    return Spec(
        _name("forward", use, dtype, tf32, tile), chip, kernel.grouped_gemm_kernel, arguments, constants,
        tile.warps, tile.stages, expects, aligned,
    )  # fmt: skip


def _weight_grad(chip: int, dtype: torch.dtype, tf32: bool, use: str) -> Spec:
    """`gather` is the first weight of an MoE layer, which reads x by token; `narrow` one with a side of 64 or less."""
    side = 64 if use == "narrow" else 768
    tile = tiles.weight_grad_tile(side, 768, dtype, (chip // 10, 0), aligned=use != "unaligned", tf32=tf32)
    kind, tma, gather = TYPES[dtype], chip >= 90 and use != "unaligned", use == "gather"
    x_tma = tma and not gather
    arguments = {
        "x": f"tensordesc<{kind}[{tile.m}, {tile.k}]>" if x_tma else f"*{kind}",
        "dy": f"tensordesc<{kind}[{tile.m}, {tile.n}]>" if tma else f"*{kind}",
        "dw_ptr": f"*{kind}",
        "ends_ptr": "*i32",
        **dict.fromkeys(("gather_x_ptr", "gather_dy_ptr"), "*i64"),
        **dict.fromkeys(("E", "K", "N", "stride_xm", "stride_dm", "stride_we", "stride_wn"), "i32"),
    }
    constants: dict[str, Any] = {
        "stride_xk": 1, "stride_dn": 1, "stride_wk": 1, "TOP_K": 8 if gather else 1,
        "GATHER_X": gather, "GATHER_DY": False, "X_TMA": x_tma, "DY_TMA": tma,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_K": tile.group, "LANES_E": LANES_E,
        "PRECISION": "tf32" if tf32 else "ieee", "UPCAST": False,
    }  # fmt: skip
    aligned = () if use == "unaligned" else ("K", "N", "stride_xm", "stride_dm", "stride_we", "stride_wn")
    expects = _expects(chip, dtype, tf32, tile.k, tma)
    return Spec(
        _name("weight_grad", use, dtype, tf32, tile), chip, kernel.grouped_weight_grad_kernel, arguments, constants,
        tile.warps, tile.stages, expects, aligned,
    )  # fmt: skip


def _swiglu_backward(chip: int) -> Spec:
    arguments = dict.fromkeys(("pre_ptr", "dh_ptr", "dpre_ptr", "h_ptr", "scale_ptr", "dscale_ptr"), "*bf16")
    arguments |= {"scatter_ptr": "*i64", "M": "i32", "N": "i32"}
    constants: dict[str, Any] = {"SCALE": True, "BLOCK_M": tiles.SWIGLU_ROWS, "BLOCK_N": tiles.SWIGLU_COLUMNS}
    name = f"grouped_gemm/swiglu_backward/scale bf16 {tiles.SWIGLU_ROWS}x{tiles.SWIGLU_COLUMNS}"
    return Spec(name, chip, kernel.swiglu_backward_kernel, arguments, constants, 4, 3, (), ("N",))


def _expects(chip: int, dtype: torch.dtype, tf32: bool, m: int, tma: bool) -> tuple[str, ...]:
    """Matrix instructions need a half type or tf32; `wgmma` and `tcgen05` also need 64 rows."""
    descriptor = (TMA,) if tma else ()
    if dtype is torch.float32 and not tf32:
        return descriptor
    return (MATRIX[chip] if m >= 64 else "mma.sync", *descriptor)
