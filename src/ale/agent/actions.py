"""What the policy's text asks for. The task says how it is read: `Task.actions`.

"bash": one call in a fence, or a final answer.

    ```bash
    ls -l
    ```

Text before the fence is reasoning. Anything that is neither a whole call nor free of fences is an error with its exact
reason, which goes back to the policy as an observation.

"text": the whole turn is the action, and the environment says what it is worth: games, dialogues.
"python": the action is the code in the last ```python fence, and without a fence the whole turn: one program to grade.
"""

from __future__ import annotations

import re

import msgspec

from ale.task import Actions

OPEN, CLOSE = "```bash\n", "\n```"
_FENCE = "```"
_CODE = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)


class Call(msgspec.Struct, frozen=True):
    """`Call("ls -l")`: carry out this action, a command where the task is one for a terminal."""

    command: str


class Answer(msgspec.Struct, frozen=True):
    """`Answer("done")`: the episode is over."""

    text: str


class Malformed(msgspec.Struct, frozen=True):
    """`Malformed("...")`: neither; `reason` says what to write instead."""

    reason: str


def parse(text: str, actions: Actions = "bash") -> Call | Answer | Malformed:
    """What `text` asks for; only "bash" knows answers and mistakes of form."""
    match actions:
        case "bash":
            return _parse_bash(text)
        case "text":
            return Call(text)
        case "python":
            fenced = _CODE.findall(text)
            return Call(fenced[-1] if fenced else text)


def _parse_bash(text: str) -> Call | Answer | Malformed:
    fences = text.count(_FENCE)
    if fences == 0:
        return Answer(text.strip())
    start = text.find(_FENCE)
    if not text.startswith(OPEN, start) or (start > 0 and text[start - 1] != "\n"):
        return Malformed("error: a call starts with ```bash on a line of its own")
    if fences == 1:
        return Malformed("error: the call is not closed with ``` on a line of its own")
    if fences > 2:
        return Malformed("error: one call in a turn, not more")
    # From the line break that ends OPEN: in an empty call the same one begins CLOSE.
    body, closed, rest = text[start + len(OPEN) - 1 :].partition(CLOSE)
    if not closed:
        return Malformed("error: the call is not closed with ``` on a line of its own")
    if rest.strip():
        return Malformed("error: nothing may follow the call")
    if not body.strip():
        return Malformed("error: the call is empty")
    if "\0" in body:
        return Malformed("error: the call holds a NUL byte")
    return Call(body[1:])


def render(action: str, actions: Actions = "bash") -> str:
    """The turn that asks for `action`: `parse(render(a, k), k) == Call(a)` unless `a` holds a fence.

    Code ("python") has to end its last line.
    """
    match actions:
        case "bash":
            return f"{OPEN}{action}{CLOSE}"
        case "text":
            return action
        case "python":
            return f"```python\n{action}```"
