"""Starts the process in which Triton interprets: the tests of the other files that ask for `use_kernels`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


FILES = ("test_grouped_gemm.py", "test_linear_logprob.py", "test_moe.py")


@pytest.mark.parametrize("which", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_the_kernels_pass_their_tests_under_the_interpreter(which: str) -> None:
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", which, *files],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout
    for name in FILES:
        assert re.search(rf"{name}::\S+.* PASSED", done.stdout), f"nothing ran in {name}"
