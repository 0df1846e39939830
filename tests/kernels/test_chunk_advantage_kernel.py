"""The Triton kernels of `chunk_advantage` without a GPU: run under the interpreter, compiled ahead of time."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ale.kernels.chunk_advantage import tiles

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, with TRITON_INTERPRET unset: it compiles",
)

IPA = {
    "LOW_POSITIVE": 1.0,
    "HIGH_POSITIVE": 1.0,
    "LOW_NEGATIVE": 0.0,
    "HIGH_NEGATIVE": 1.0,
    "DROP": False,
    "RATIO_MEAN": True,
    "LOG_LOW": -math.inf,
    "LOG_HIGH": math.log(2.0),
}


def test_every_test_of_the_op_passes_on_the_kernels_under_the_interpreter() -> None:
    """Triton decides at import whether it interprets, hence a process of its own."""
    tests = Path(__file__).with_name("test_chunk_advantage_op.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    # All but one, that the CPU path works without triton.
    summary = re.search(r"(\d+) passed, 1 skipped", run.stdout)
    assert summary is not None, run.stdout[-500:]
    assert int(summary[1]) > 80


def compile_for(arch: int, name: str, constants: dict[str, Any], dtype: str = "fp32", warps: int = 4) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ale.kernels.chunk_advantage import kernel

    function = getattr(kernel, name)
    kinds = dict.fromkeys(
        ("pieces_ptr", "tokens_ptr", "offsets_ptr", "ratio_tokens_ptr", "mismatch_tokens_ptr"), "*i32"
    )
    kinds |= {"reward_ptr": "*fp64", "mask_ptr": "*i8"} | dict.fromkeys(("logp_ptr", "old_ptr", "mu_ptr"), f"*{dtype}")
    kinds |= (
        {"out_ptr": f"*{dtype}"} | dict.fromkeys(("P", "V", "S", "U"), "i32") | dict.fromkeys(constants, "constexpr")
    )
    source = ASTSource(
        function,
        {argument: kinds.get(argument, "*fp32") for argument in function.arg_names},
        {(function.arg_names.index(argument),): value for argument, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def usage(compiled: Any, at: Path) -> dict[str, int]:
    """Registers, stack and local bytes as the assembler reports them."""
    import triton

    cubin = at / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    printed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, timeout=60, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed.stdout + printed.stderr)}


def configurations() -> list[Any]:
    import triton.language as tl

    sums = {"HAS_OLD": True, "HAS_MU": True, "ROWS": tiles.tile(4).rows, "PIECE": tiles.PIECE, "ACC": tl.float32}
    wide = sums | {"ROWS": tiles.tile(8).rows, "ACC": tl.float64}
    pieces = {"ROWS": tiles.tile(4).rows, "PIECE": tiles.PIECE}
    segments = {"ACC": tl.float32, "ROWS": tiles.SEGMENT_ROWS, "LANES": tiles.SEGMENT_LANES}
    return [
        pytest.param("piece_sums_kernel", sums, "fp32", id="piece_sums"),
        pytest.param("piece_sums_kernel", sums, "bf16", id="piece_sums_bf16"),
        pytest.param("piece_sums_kernel", wide, "fp64", id="piece_sums_fp64"),
        pytest.param(
            "piece_sums_kernel", sums | {"HAS_OLD": False, "HAS_MU": False}, "fp32", id="piece_sums_imitation"
        ),
        pytest.param("segment_sums_kernel", segments, "fp32", id="segment_sums"),
        pytest.param("returns_kernel", {"GAMMA": 0.95, "BLOCK": tiles.SCAN}, "fp32", id="returns"),
        pytest.param("weigh_kernel", IPA | {"BLOCK": tiles.UNITS}, "fp32", id="weigh"),
        pytest.param("weigh_kernel", IPA | {"DROP": True, "BLOCK": tiles.UNITS}, "fp32", id="weigh_drop"),
        pytest.param("expand_kernel", pieces, "fp32", id="expand"),
        pytest.param("expand_kernel", pieces, "bf16", id="expand_bf16"),
    ]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "constants", "dtype"), configurations() if importlib.util.find_spec("triton") is not None else []
)
def test_a_kernel_compiles_ahead_of_time_without_spilling(
    name: str, constants: dict[str, Any], dtype: str, arch: int, tmp_path: Path
) -> None:
    compiled = compile_for(arch, name, constants, dtype)
    used = usage(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    # 128 threads of at most 128 registers: at least four programs on a multiprocessor.
    assert 0 < used["REG"] <= 128
    assert compiled.metadata.shared <= 2048
    assert "atom" not in compiled.asm["ptx"]


# --- tiles ------------------------------------------------------------------------------------------------------------


def ragged(lengths: list[int]) -> tiles.Ragged:
    chunk_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return tiles.Ragged(chunk_offsets, np.array([0, len(lengths)]), None)


@pytest.mark.parametrize(
    "lengths", [[], [0], [1], [128], [129], [0, 0, 300, 0], [127, 128, 129], [100_000, 1], [1] * 1000], ids=str
)
def test_pieces_cover_each_token_once_and_never_two_chunks(lengths: list[int]) -> None:
    pieces, offsets = tiles.cut(ragged(lengths))
    covered = [t for start, stop in pieces[1:].T for t in range(start, stop)]
    assert covered == list(range(sum(lengths)))
    edges = ragged(lengths).chunk_offsets
    assert all(edges[c] <= start < stop <= edges[c + 1] for c, start, stop in pieces.T)
    assert all(0 < stop - start <= tiles.PIECE for _, start, stop in pieces.T)
    assert offsets.tolist() == np.searchsorted(pieces[0], range(len(lengths) + 1)).tolist()


def test_a_chunk_is_cut_the_same_wherever_it_lies() -> None:
    alone, _ = tiles.cut(ragged([300]))
    after, _ = tiles.cut(ragged([77, 300]))
    assert (after[1:, 1:] - 77 == alone[1:]).all()


def test_programs_fill_the_device_and_no_more() -> None:
    assert tiles.programs(0, 16, 132) == 1
    assert tiles.programs(17, 16, 132) == 2
    assert tiles.programs(10**6, 16, 132) == 132 * tiles.PROGRAMS_PER_MULTIPROCESSOR
    assert tiles.tile(4).piece == tiles.tile(8).piece
