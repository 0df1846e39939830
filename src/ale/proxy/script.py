"""What a model would say to have a program carry out a reference solution."""

from __future__ import annotations

import json
import re

from ale.agent import actions
from ale.config import WarmStartConfig
from ale.proxy.speech import ToolSyntax
from ale.task import Task

_TAGGED = '<tool_call>\n{"name": "bash", "arguments": {"command": {json}}}\n</tool_call>'


def lines(task: Task, config: WarmStartConfig, syntax: ToolSyntax) -> tuple[str, ...]:
    """What the model says in an episode of this task, turn by turn."""
    said = tuple(_line(config.say_action, syntax, action) for action in task.solution)
    return (*said, config.say_end) if config.say_end else said


def _line(pattern: str, syntax: ToolSyntax, action: str) -> str:
    if not pattern:
        if syntax == "fence":
            return actions.render(action)
        pattern = _TAGGED
    written = {"action": action, "json": json.dumps(action, ensure_ascii=False)}
    return re.sub(r"\{(action|json)\}", lambda found: written[found[1]], pattern)
