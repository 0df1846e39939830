"""The configurations of `chunk_advantage` that `bench.aot` compiles: every kernel, by the types it meets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton.language as tl

from ale.kernels.chunk_advantage import kernel, tiles
from bench.aot import Spec

CHIPS = (80, 90, 100)
WARPS, STAGES = 4, 3
INTEGERS = ("pieces_ptr", "tokens_ptr", "offsets_ptr", "ratio_tokens_ptr", "mismatch_tokens_ptr")
IPA: dict[str, Any] = {
    "LOW_POSITIVE": 1.0, "HIGH_POSITIVE": 1.0, "LOW_NEGATIVE": 0.0, "HIGH_NEGATIVE": 1.0, "DROP": False,
    "RATIO_MEAN": True, "LOG_LOW": -math.inf, "LOG_HIGH": math.log(2.0), "BLOCK": tiles.UNITS,
}  # fmt: skip


def specs() -> Iterator[Spec]:
    for chip in CHIPS:
        for kind in ("fp32", "bf16", "fp64"):
            yield _spec(chip, "piece_sums", kind, _pieces(kind) | {"HAS_OLD": True, "HAS_MU": True, "ACC": _acc(kind)})
        imitation = {"HAS_OLD": False, "HAS_MU": False, "ACC": tl.float32}
        yield _spec(chip, "piece_sums", "fp32", _pieces("fp32") | imitation, "imitation ")
        segments = {"ACC": tl.float32, "ROWS": tiles.SEGMENT_ROWS, "LANES": tiles.SEGMENT_LANES}
        yield _spec(chip, "segment_sums", "fp32", segments)
        yield _spec(chip, "returns", "fp32", {"GAMMA": 0.95, "BLOCK": tiles.SCAN})
        yield _spec(chip, "weigh", "fp32", IPA)
        yield _spec(chip, "weigh", "fp32", IPA | {"DROP": True}, "drop ")
        for kind in ("fp32", "bf16"):
            yield _spec(chip, "expand", kind, _pieces(kind))


def _acc(kind: str) -> Any:
    return tl.float64 if kind == "fp64" else tl.float32


def _pieces(kind: str) -> dict[str, int]:
    return {"ROWS": tiles.tile(8 if kind == "fp64" else 4).rows, "PIECE": tiles.PIECE}


def _spec(chip: int, name: str, kind: str, constants: dict[str, Any], use: str = "") -> Spec:
    function = getattr(kernel, f"{name}_kernel")
    sums = "fp64" if kind == "fp64" else "fp32"
    types = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(("P", "V", "S", "U"), "i32")
    types |= {"reward_ptr": "*fp64", "mask_ptr": "*i8"}
    if name in ("piece_sums", "expand"):
        types |= dict.fromkeys(("logp_ptr", "old_ptr", "mu_ptr", "out_ptr"), f"*{kind}")
    arguments = {arg: types.get(arg, f"*{sums}") for arg in function.arg_names if arg not in constants}
    sides = "x".join(str(constants[side]) for side in ("ROWS", "PIECE", "LANES", "BLOCK") if side in constants)
    return Spec(f"chunk_advantage/{name}/{use}{kind} {sides}", chip, function, arguments, constants, WARPS, STAGES)
