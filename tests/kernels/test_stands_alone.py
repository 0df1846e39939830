"""`ale.kernels` could be lifted out: it needs torch, and triton and transformers only where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import ale.kernels

KERNELS = Path(ale.kernels.__file__).parent


def test_importing_the_kernels_imports_neither_triton_nor_transformers() -> None:
    code = (
        "import sys, ale.kernels, ale.kernels.routing_replay; "
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'transformers', 'msgspec')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_kernels_import_nothing_else_of_ale() -> None:
    imported = set()
    for file in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add((file.name, node.module or ""))
            elif isinstance(node, ast.Import):
                imported |= {(file.name, alias.name) for alias in node.names}
    assert ("op.py", "ale.kernels.device") in imported
    assert [pair for pair in imported if pair[1].startswith("ale") and not pair[1].startswith("ale.kernels")] == []
