"""The arrows between the layers of the package point down, and what should be light is light."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ale

PACKAGE = Path(ale.__file__).parent

# From the top down. A part may import from its own layer and from those below; parts are modules and packages of `ale`.
LAYERS = (
    {
        "__main__",
        "cli",
        "commands",
        "diff",
        "doctor",
        "embedding",
        "plan",
        "plot",
        "progress_view",
        "service",
        "show",
        "task_env",
    },
    {"pipeline", "run", "warm_start", "simulation", "replay"},
    {"actors"},
    {"policy", "envs", "sandbox", "agent", "proxy", "algorithm", "learner", "data", "models", "hub", "player"},
    {"supervisor", "life", "worker", "actor", "bus", "inbox", "topic", "mailbox", "waiting", "unnamed"}
    | {"process", "serving", "testing", "virtual_clock"},
    {"tape", "messages", "task", "config", "config_file", "progress", "errors", "wire", "audit", "vitals", "heart"},
)
# Torch and Triton alone: could be lifted out. Only these call it.
KERNELS, CALLERS = "kernels", {"learner", "policy", "algorithm", "models", "kernels"}
# The rocklet is a package of its own where it runs, inside a sandbox.
OURS = {"ale", "rocklet", "__future__"}
HEAVY = ("torch", "triton", "vllm", "aiodocker", "httpx", "transformers", "tokenizers", "starlette", "uvicorn")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of `ale` that `path` imports, lazily or not, with the line."""
    package = ["ale", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"ale.{alias.name}" for alias in node.names] if module == "ale" else [module]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.startswith("ale."))


def foreign(path: Path) -> Iterator[str]:
    """Every package that is neither `ale` nor Python's own, lazily imported or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        yield from {name.split(".")[0] for name in names} - sys.stdlib_module_names - OURS


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def arrows() -> Iterator[tuple[str, str, str]]:
    """(part, part it imports, where)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, line in imports(path):
            yield part(path), name.split(".")[1], f"{path.relative_to(PACKAGE)}:{line} imports {name}"


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {part(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts - {KERNELS} == set().union(*LAYERS) & parts


def test_no_arrow_points_up() -> None:
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    wrong = [where for a, b, where in arrows() if a in layer and b in layer and layer[b] < layer[a]]
    assert wrong == []


def test_packages_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for a, b, _ in arrows():
        if a != b and any({a, b} <= names for names in LAYERS[:4]):
            graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_all_that_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for name, lines in extras.items() if name != "dev" for line in lines]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in wanted}
    used = {name for path in PACKAGE.rglob("*.py") for name in foreign(path)}
    assert used - declared == set()


def test_kernels_stand_alone() -> None:
    assert [where for a, b, where in arrows() if a == KERNELS and b != KERNELS] == []
    assert [where for a, b, where in arrows() if b == KERNELS and a not in CALLERS] == []


def test_the_product_does_not_import_its_test_tools() -> None:
    assert [where for a, b, where in arrows() if b == "testing" and a != "testing"] == []


@pytest.mark.parametrize("module", ["ale", "ale.cli", "ale.config", "ale.bus", "ale.sandbox", "ale.envs.task_dir"])
def test_what_should_be_light_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
