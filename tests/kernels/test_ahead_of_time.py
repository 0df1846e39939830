"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, and costs what the kept table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")
sys.path.insert(0, str(ROOT))

from bench import aot  # noqa: E402


@pytest.fixture(scope="module")
def rows() -> list[aot.Resources]:
    """Compiled in a process of its own: in this one the kernels belong to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return [aot.Resources(**row) for row in json.loads(done.stdout.splitlines()[0])]


def test_no_configuration_spills_overflows_shared_memory_adds_atomically_or_lacks_its_instructions(
    rows: list[aot.Resources],
) -> None:
    assert {row.chip for row in rows} == {80, 90, 100}
    assert [f"{row.name} on sm_{row.chip} {fault}" for row in rows for fault in row.faults()] == []


def test_matrix_units_and_descriptors_are_used_where_they_exist(rows: list[aot.Resources]) -> None:
    for chip, matrix in aot.MATRIX.items():
        tall = [
            row for row in rows if row.chip == chip and "bf16 128x" in row.name and "swiglu_backward" not in row.name
        ]
        assert tall
        assert all(matrix in row.instructions for row in tall)
        moved = [row for row in tall if "pointer" not in row.name and "unaligned" not in row.name]
        assert all((aot.TMA in row.instructions) == (chip >= 90) for row in moved)


def test_the_kernels_that_only_move_bytes_leave_room_for_many_programs(rows: list[aot.Resources]) -> None:
    """128 threads of at most 128 registers: at least four programs on a multiprocessor hide each other's loads."""
    moving = [row for row in rows if row.name.startswith("chunk_advantage/")]
    assert len(moving) == 3 * 10
    assert [row for row in moving if row.registers > 128 or row.shared > 2048] == []


def test_the_kept_table_is_what_the_kernels_compile_to(rows: list[aot.Resources]) -> None:
    assert aot.RESULTS.read_text() == aot.table(rows), "resources changed: look, then python -m bench.aot --write"


def test_a_spill_an_overflow_an_atomic_and_a_missing_instruction_are_faults() -> None:
    fine = aot.Resources("k", 90, 128, 1024, 0, 0, 0.5, "wgmma", "")
    assert fine.faults() == []
    for change, word in (
        ({"stack": 8}, "spills"),
        ({"shared": 10**6}, "shared memory"),
        ({"missing": "wgmma"}, "lacks"),
        ({"atomic": True}, "atomically"),
    ):
        (fault,) = aot.Resources(**{**vars(fine), **change}).faults()
        assert word in fault
