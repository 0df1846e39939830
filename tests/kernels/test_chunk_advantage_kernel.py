"""The Triton kernels of `chunk_advantage` under the interpreter, and how their work is cut."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ale.kernels.chunk_advantage import tiles

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, with TRITON_INTERPRET unset: it starts the interpreter itself",
)


def interpret(*options: str, examples: int) -> int:
    """How many tests of the op pass. Triton decides at import whether it interprets, hence a process of its own."""
    tests = Path(__file__).with_name("test_chunk_advantage_op.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "ALE_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    # All but one, that the CPU path works without triton.
    summary = re.search(r"(\d+) passed, 1 skipped", run.stdout)
    assert summary is not None, run.stdout[-500:]
    return int(summary[1])


def test_the_tests_of_the_op_pass_on_the_kernels_under_the_interpreter() -> None:
    assert interpret("-m", "not full", examples=3) > 60


@pytest.mark.full
def test_every_test_of_the_op_passes_there_over_its_whole_grid_too() -> None:
    assert interpret(examples=8) > 80


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
