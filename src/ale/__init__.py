"""ale: an Agentic Learning Ecosystem on one node. `import ale` is light: each name is loaded when it is first used.

config = ale.load("examples/nano.toml", ["learner.updates=20"])
async with ale.open_run(config) as run:
    async for update in run.updates(): ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ale.actors.trainer import Update as Update
    from ale.config import RunConfig as RunConfig
    from ale.config_file import load as load
    from ale.config_file import parse as parse
    from ale.embedding import Training as Training
    from ale.embedding import open_run as open_run
    from ale.envs.env import Step as Step
    from ale.errors import AleError as AleError
    from ale.errors import UserError as UserError
    from ale.messages import Trajectory as Trajectory
    from ale.progress import Progress as Progress
    from ale.progress import Summary as Summary
    from ale.task import Task as Task
    from ale.task_env import make as make
    from ale.task_env import make_async as make_async

__version__ = "0.1.0"

_HOME = {
    "AleError": "errors",
    "Progress": "progress",
    "RunConfig": "config",
    "Step": "envs.env",
    "Summary": "progress",
    "Task": "task",
    "Training": "embedding",
    "Trajectory": "messages",
    "Update": "actors.trainer",
    "UserError": "errors",
    "load": "config_file",
    "make": "task_env",
    "make_async": "task_env",
    "open_run": "embedding",
    "parse": "config_file",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ale' has no attribute {name!r}")
    value = getattr(import_module(f"ale.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
