"""What the policy's text asks for: one bash call in a fence, or a final answer.

    ```bash
    ls -l
    ```

Text before the fence is reasoning. Anything that is neither a whole call nor free of fences is an error with its exact
reason, which goes back to the policy as an observation. With `actions = "text"` (games, dialogues) the whole turn is
the action.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Actions = Literal["bash", "text"]
OPEN, CLOSE = "```bash\n", "\n```"
_FENCE = "```"


class Call(msgspec.Struct, frozen=True):
    """`Call("ls -l")`: run this command."""

    command: str


class Answer(msgspec.Struct, frozen=True):
    """`Answer("done")`: the episode is over."""

    text: str


class Malformed(msgspec.Struct, frozen=True):
    """`Malformed("...")`: neither; `reason` says what to write instead."""

    reason: str


def parse(text: str, actions: Actions = "bash") -> Call | Answer | Malformed:
    if actions == "text":
        return Call(text)
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


def render(command: str, actions: Actions = "bash") -> str:
    """The text of a call; `parse(render(c)) == Call(c)` for every command without fences."""
    return command if actions == "text" else f"{OPEN}{command}{CLOSE}"
