"""What a model's text says: a thought, content, and calls of tools, in the syntax that the model was taught.

`Speech.read(text, final=False)` may be called on a growing text: what it gives then only grows as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec
import orjson

from ale.agent import actions
from ale.proxy.dialogue import ToolCall

ToolSyntax = Literal["tags", "fence"]
_THINK, _UNTHINK = "<think>", "</think>"


class Heard(msgspec.Struct, frozen=True):
    """`calls` are pairs of a name and its arguments. `malformed`: a call was begun that is none."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str | None = None
    malformed: bool = False


class Syntax(Protocol):
    """How calls are written in text."""

    opener: str

    def calls(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, tuple[tuple[str, str], ...]] | None:
        """The text before the calls, and the calls; None when what stands there is no whole call."""

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The text of calls that another program made up."""

    def forced(self, tool: str | None) -> str:
        """How a turn has to begin to be a call: of `tool`, or of any."""


class _TaggedCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


class Tags:
    """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, one or more, last in the turn (Hermes, Qwen)."""

    opener = "<tool_call>"
    _closer = "</tool_call>"
    _decoder = msgspec.json.Decoder(_TaggedCall)

    def calls(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, tuple[tuple[str, str], ...]] | None:
        before, *bodies = text.split(self.opener)
        found = []
        for body in bodies:
            inside, closed, after = body.partition(self._closer)
            if not closed or after.strip():
                return None
            try:
                call = self._decoder.decode(inside.strip())
            except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
                return None
            arguments = bytes(call.arguments).decode()
            if not _is_object(arguments):
                return None
            found.append((call.name, arguments))
        return before, tuple(found)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(
            f'<tool_call>\n{{"name": {orjson.dumps(c.name).decode()}, "arguments": {c.arguments}}}\n</tool_call>'
            for c in calls
        )

    def forced(self, tool: str | None) -> str:
        name = "" if tool is None else f'{tool}", "arguments": '
        return f'<tool_call>\n{{"name": "{name}'


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


class Fence:
    """One bash command in a fence, last in the turn: `ale.agent.actions`. It calls the only tool there is, or `bash`;
    the command is its first parameter."""

    opener = actions.OPEN

    def calls(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, tuple[tuple[str, str], ...]] | None:
        parsed = actions.parse(text)
        if not isinstance(parsed, actions.Call):
            return None
        name, parameter = "bash", "command"
        if len(tools) == 1:
            function = tools[0].get("function", {})
            name = function.get("name", name)
            parameter = next(iter((function.get("parameters") or {}).get("properties") or {}), parameter)
        return text[: text.index(self.opener)], ((name, orjson.dumps({parameter: parsed.command}).decode()),)

    def write(self, calls: Sequence[ToolCall]) -> str:
        commands = []
        for call in calls:
            try:
                values = list(orjson.loads(call.arguments).values())
            except (orjson.JSONDecodeError, AttributeError):
                values = []
            commands.append(actions.render(str(values[0]) if values else call.arguments))
        return "\n".join(commands)

    def forced(self, tool: str | None) -> str:
        return self.opener


SYNTAXES: dict[ToolSyntax, Syntax] = {"tags": Tags(), "fence": Fence()}


class Speech:
    """`opens_thought`: the prompt itself ends with `<think>`, so the turn begins inside of it."""

    def __init__(self, syntax: ToolSyntax, *, thinks: bool, opens_thought: bool) -> None:
        self.syntax = SYNTAXES[syntax]
        self._thinks = thinks
        self._opens_thought = opens_thought

    def read(self, text: str, tools: Sequence[dict[str, Any]], *, final: bool, stop: Sequence[str] = ()) -> Heard:
        """`tools` empty: no calls are looked for. `stop`: strings of which no beginning may be shown yet."""
        reasoning, rest, inside = self._thought(text)
        if inside:
            shown = reasoning or ""
            return Heard("", reasoning=shown if final else _held(shown, [_UNTHINK, *stop]))
        at = rest.find(self.syntax.opener) if tools else -1
        if not final and self._thinks and reasoning is None and not rest.strip():
            return Heard("")  # a thought may still begin
        if not final:
            return Heard(rest[:at] if at >= 0 else _held(rest, self._held_for(tools, stop)), reasoning=reasoning)
        if at < 0:
            return Heard(rest, reasoning=reasoning)
        found = self.syntax.calls(rest, tools)
        if found is None:
            return Heard(rest, reasoning=reasoning, malformed=True)
        return Heard(*found, reasoning=reasoning)

    def _held_for(self, tools: Sequence[Any], stop: Sequence[str]) -> list[str]:
        return [*stop, *([self.syntax.opener] if tools else []), *([_THINK] if self._thinks else [])]

    def _thought(self, text: str) -> tuple[str | None, str, bool]:
        """(thought, rest, whether the text ends inside the thought)."""
        if not self._thinks:
            return None, text, False
        body = text.lstrip()
        if body.startswith(_THINK):
            body = body[len(_THINK) :]
        elif not self._opens_thought:
            return None, text, False
        thought, closed, rest = body.partition(_UNTHINK)
        return thought, rest, not closed


def _held(text: str, until: Sequence[str]) -> str:
    """`text` without an end that may be the beginning of one of `until`, or half a character."""
    text = text.rstrip("\ufffd")
    longest = max((len(s) for s in until), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(s.startswith(tail) for s in until):
            return text[:-length]
    return text
