"""OpenAI's responses API, without storage: every request holds its whole input."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ale.proxy.body import check, decode, schema_depth
from ale.proxy.dialogue import Delta, Entry, Refusal, Said, ToolCall, Want
from ale.proxy.openai_chat import _ROLES, Part, check_choice, parts_text


class _Item(msgspec.Struct):
    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: str | list[Part] | None = None


class _Tool(msgspec.Struct):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str = ""


class _Format(msgspec.Struct, frozen=True):
    type: str = "text"


class _TextOptions(msgspec.Struct):
    format: _Format = _Format()


class _Body(msgspec.Struct):
    input: str | list[_Item]
    model: str = ""
    instructions: str | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | _Choice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    text: _TextOptions | None = None
    top_logprobs: int | None = None


_decoder = msgspec.json.Decoder(_Body)


def read(body: bytes) -> tuple[Want, Responses]:
    """What is wanted, and what will write the answer. Raises `Refusal`."""
    b = decode(_decoder, body)
    refused = {
        "previous_response_id": b.previous_response_id is not None,
        "conversation": b.conversation is not None,
        "background": bool(b.background),
        "text.format": b.text is not None and b.text.format.type != "text",
        "top_logprobs": bool(b.top_logprobs),
    }
    for name, asked in refused.items():
        if asked:
            raise Refusal(400, f"{name} is not supported by this engine", param=name, code="unsupported_parameter")
    tools = tuple(_tool(i, tool) for i, tool in enumerate(b.tools or ()))
    choice = f"={b.tool_choice.name}" if isinstance(b.tool_choice, _Choice) else b.tool_choice or "auto"
    check_choice(choice, tools)
    entries = [Entry("system", b.instructions)] if b.instructions else []
    entries += [Entry("user", b.input)] if isinstance(b.input, str) else _entries(b.input)
    if not entries:
        raise Refusal(400, "input must hold at least one item", param="input")
    want = Want(
        entries=tuple(entries),
        tools=tools,
        tool_choice=choice,
        parallel_calls=b.parallel_tool_calls is not False,
        max_tokens=b.max_output_tokens,
        temperature=b.temperature,
        top_p=b.top_p,
        stream=bool(b.stream),
    )
    check(want)
    return want, Responses(b)


def _tool(number: int, tool: _Tool) -> dict[str, Any]:
    if tool.type != "function" or not tool.name:
        raise Refusal(400, f"tools[{number}]: only functions are supported, not {tool.type!r}", param="tools")
    schema_depth(tool.parameters, f"tools[{number}].parameters")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _entries(items: Sequence[_Item]) -> list[Entry]:
    """Items that one answer consisted of (thought, text, calls) are one entry again."""
    found: list[Entry] = []
    own: list[_Item] = []  # items of the assistant that follow each other
    for i, item in enumerate(items):
        if item.type in ("function_call", "reasoning") or (item.type == "message" and item.role == "assistant"):
            own.append(item)
            continue
        found += _turn(own, i)
        own = []
        where = f"input[{i}]"
        if item.type == "function_call_output":
            found.append(Entry("tool", parts_text(item.output, where), call_id=item.call_id))
        elif item.type == "message" and item.role in _ROLES:
            found.append(Entry(_ROLES[item.role], parts_text(item.content, where)))
        else:
            raise Refusal(
                400, f"{where}: items of type {item.type!r}, role {item.role!r} are not supported", param=where
            )
    return [*found, *_turn(own, len(items))]


def _turn(items: Sequence[_Item], before: int) -> list[Entry]:
    if not items:
        return []
    where = f"input[{before - len(items)}]"
    text = "".join(parts_text(i.content, where) for i in items if i.type == "message")
    thoughts = [part.text or "" for i in items if i.type == "reasoning" for part in i.summary or ()]
    calls = tuple(ToolCall(i.call_id, i.name, i.arguments) for i in items if i.type == "function_call")
    return [Entry("assistant", text, calls, "".join(thoughts) if thoughts else None)]


class Responses:
    """Writes the answer to one request."""

    def __init__(self, body: _Body) -> None:
        self._number = 0
        self._text_at: int | None = None
        self._items = 0
        self._thought_at: int | None = None
        self._id = secrets.token_hex(12)
        self._head: dict[str, Any] = {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "instructions": body.instructions,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "tool_choice": msgspec.to_builtins(body.tool_choice) or "auto",
            "tools": [{"strict": None, **msgspec.to_builtins(tool)} for tool in body.tools or ()],
            "metadata": {},
            "error": None,
        }

    def whole(self, answers: Sequence[Said]) -> bytes:
        return orjson.dumps(self._response(answers[0], self._output(answers[0])))

    def begin(self, n: int) -> bytes:
        response = {**self._head, "status": "in_progress", "output": [], "incomplete_details": None, "usage": None}
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        out = b""
        if delta.reasoning:
            if self._thought_at is None:
                self._thought_at = self._next()
                out += self._added(self._thought_at, self._thought(""))
                part = {"type": "summary_text", "text": ""}
                out += self._event(
                    "response.reasoning_summary_part.added",
                    **self._at("rs", self._thought_at),
                    summary_index=0,
                    part=part,
                )
            out += self._event(
                "response.reasoning_summary_text.delta",
                **self._at("rs", self._thought_at),
                summary_index=0,
                delta=delta.reasoning,
            )
        if delta.text:
            if self._text_at is None:
                self._text_at = self._next()
                out += self._added(self._text_at, {**self._message(""), "status": "in_progress", "content": []})
                out += self._event(
                    "response.content_part.added", **self._at("msg", self._text_at), content_index=0, part=_part("")
                )
            out += self._event(
                "response.output_text.delta",
                **self._at("msg", self._text_at),
                content_index=0,
                delta=delta.text,
                logprobs=[],
            )
        return out

    def end(self, answers: Sequence[Said]) -> bytes:
        said = answers[0]
        out = b""
        if self._thought_at is not None:
            at, thought = self._at("rs", self._thought_at), said.reasoning or ""
            part = {"type": "summary_text", "text": thought}
            out += self._event("response.reasoning_summary_text.done", **at, summary_index=0, text=thought)
            out += self._event("response.reasoning_summary_part.done", **at, summary_index=0, part=part)
            out += self._done(self._thought_at, self._thought(thought))
        if self._text_at is not None:
            at = self._at("msg", self._text_at)
            out += self._event(
                "response.output_text.done", **at, content_index=0, text=said.text, logprobs=[]
            ) + self._event("response.content_part.done", **at, content_index=0, part=_part(said.text))
            out += self._done(self._text_at, self._message(said.text))
        for call in said.calls:
            number, item = self._next(), self._call(call)
            at = {"item_id": item["id"], "output_index": number}
            out += self._added(number, {**item, "arguments": "", "status": "in_progress"})
            out += self._event("response.function_call_arguments.delta", **at, delta=call.arguments)
            out += self._event("response.function_call_arguments.done", **at, name=call.name, arguments=call.arguments)
            out += self._done(number, item)
        response = self._response(said, self._output(said))
        kind = "response.incomplete" if said.finish == "length" else "response.completed"
        return out + self._event(kind, response=response)

    def _response(self, said: Said, output: list[dict[str, Any]]) -> dict[str, Any]:
        cut = said.finish == "length"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": said.prompt_tokens,
                "input_tokens_details": {"cached_tokens": said.cached_tokens},
                "output_tokens": said.sampled_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": said.prompt_tokens + said.sampled_tokens,
            },
        }

    def _output(self, said: Said) -> list[dict[str, Any]]:
        output = [self._thought(said.reasoning)] if said.reasoning else []
        if said.text or not said.calls:
            output.append(self._message(said.text))
        return [*output, *map(self._call, said.calls)]

    def _thought(self, text: str) -> dict[str, Any]:
        summary = [{"type": "summary_text", "text": text}] if text else []
        return {"id": f"rs_{self._id}", "type": "reasoning", "summary": summary}

    def _message(self, text: str) -> dict[str, Any]:
        return {
            "id": f"msg_{self._id}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [_part(text)],
        }

    def _call(self, call: ToolCall) -> dict[str, Any]:
        return {
            "id": f"fc_{self._id}_{call.id}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }

    def _next(self) -> int:
        self._items += 1
        return self._items - 1

    def _at(self, kind: str, number: int) -> dict[str, Any]:
        return {"item_id": f"{kind}_{self._id}", "output_index": number}

    def _added(self, number: int, item: dict[str, Any]) -> bytes:
        return self._event("response.output_item.added", output_index=number, item=item)

    def _done(self, number: int, item: dict[str, Any]) -> bytes:
        return self._event("response.output_item.done", output_index=number, item=item)

    def _event(self, kind: str, **data: Any) -> bytes:
        self._number += 1
        body = orjson.dumps({"type": kind, "sequence_number": self._number - 1, **data})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
