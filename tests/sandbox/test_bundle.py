"""The bundle: what a rocklet starts with, read from one file."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from ale.sandbox import rocklet
from ale.sandbox.interpreter import BUNDLED, Interpreter, bundle

PACKAGE = Path(rocklet.__file__).parent


def needs(stem: str) -> set[str]:
    """The siblings that a module imports when it is loaded; not those that its functions import later."""
    body = ast.parse((PACKAGE / f"{stem}.py").read_text()).body
    return {node.module or "" for node in body if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_each_bundled_module_comes_after_all_that_it_needs() -> None:
    for number, stem in enumerate(BUNDLED):
        assert needs(stem) <= set(BUNDLED[:number]), stem


def test_a_rocklet_starts_without_looking_for_a_module_of_its_own(tmp_path: Path) -> None:
    interpreter = Interpreter(tmp_path / "copy")
    package = interpreter.directory / "rocklet"
    for module in package.glob("*.pyc"):
        if module.stem != "start":
            module.unlink()
    python = interpreter.directory / "bin" / Path(interpreter.argv[0]).name
    # Its connection ends at once, and so does it.
    done = subprocess.run(
        [python, *interpreter.argv[1:-1], package / "start.pyc"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"LD_LIBRARY_PATH": str(interpreter.directory / "lib")},
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_bundle_lists_its_modules_and_their_sizes_first() -> None:
    head, _, body = bundle(PACKAGE).partition(b"\n")
    names, sizes = zip(*(entry.split(b"=") for entry in head.split()), strict=True)
    assert names[0] == b"rocklet"
    assert len(names) == len(BUNDLED)
    assert sum(map(int, sizes)) == len(body)
