"""What every API of the proxy is read into: entries of a dialogue, what is wanted next, what was said.

`Refusal` is the one error that a client may see on purpose; each API writes it in its provider's official shape.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
Finish = Literal["stop", "length", "tool_calls"]


class Refusal(Exception):
    """A request that is not carried out. `status` is that of HTTP; `kind`, `param` and `code` as OpenAI has them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code


class ToolCall(msgspec.Struct, frozen=True):
    """`ToolCall(id="call_3_0", name="bash", arguments='{"command": "ls"}')`. `arguments` is JSON, as text."""

    id: str
    name: str
    arguments: str


class Entry(msgspec.Struct, frozen=True):
    """One message: `Entry("tool", "a.txt", call_id="call_3_0")`. `reasoning` is thought apart from the text."""

    role: Role
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    call_id: str = ""


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for next, whichever API it speaks. None: not said, so the episode's own setting holds.

    `entries` is the dialogue so far; for plain completions it is empty and `prompt` says what to continue. `prefix` is
    how the answer has to begin. `tools` are function schemas in the shape of OpenAI's chat API.
    """

    entries: tuple[Entry, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    prefix: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    """`auto`, `none`, `required`, or `=NAME`."""
    parallel_calls: bool = True
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    stream: bool = False


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as the client sees it. `tokens` pairs the text of each sampled token with its log-probability."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    finish: Finish = "stop"
    stopped_at: str | None = None
    """The stop string that ended it, which the text does not show."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were taken from the record, not tokenised."""
    sampled_tokens: int = 0
    tokens: tuple[tuple[str, float], ...] = ()

    @property
    def entry(self) -> Entry:
        return Entry("assistant", self.text, self.calls, self.reasoning)


class Delta(msgspec.Struct, frozen=True):
    """What is new in a stream since the last one: `Delta(text="hel")`."""

    text: str = ""
    reasoning: str = ""
