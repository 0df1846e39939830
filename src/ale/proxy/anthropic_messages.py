"""Anthropic's messages: blocks in, blocks out, whole or as a stream of named events."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ale.proxy.body import check, decode, schema_depth
from ale.proxy.dialogue import Delta, Entry, Refusal, Said, ToolCall, Want
from ale.proxy.openai_chat import check_choice


class _Block(msgspec.Struct):
    type: str
    text: str | None = None
    thinking: str | None = None
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: str | list[_Block] | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Block]


class _Tool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str = ""
    disable_parallel_tool_use: bool = False


class _Body(msgspec.Struct):
    messages: list[_Message]
    max_tokens: int
    model: str = ""
    system: str | list[_Block] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False


_decoder = msgspec.json.Decoder(_Body)


def read(body: bytes) -> tuple[Want, Messages]:
    """What is wanted, and what will write the answer. Raises `Refusal`."""
    b = decode(_decoder, body)
    if not b.messages:
        raise Refusal(400, "messages: at least one message is required", param="messages")
    tools = tuple(_tool(i, tool) for i, tool in enumerate(b.tools or ()))
    choice = "auto"
    if b.tool_choice is not None:
        kinds = {"auto": "auto", "none": "none", "any": "required", "tool": f"={b.tool_choice.name}"}
        if b.tool_choice.type not in kinds:
            raise Refusal(400, f"tool_choice.type: expected one of {', '.join(kinds)}", param="tool_choice")
        choice = kinds[b.tool_choice.type]
    check_choice(choice, tools)
    entries = [entry for i, message in enumerate(b.messages) for entry in _entries(message, f"messages.{i}")]
    system = b.system if isinstance(b.system, str) else _text(b.system or [], "system")
    prefix = ""
    if entries and entries[-1].role == "assistant" and not entries[-1].calls:  # the answer has to begin like this
        prefix = entries.pop().text
    want = Want(
        entries=(*([Entry("system", system)] if system else []), *entries),
        prefix=prefix,
        tools=tools,
        tool_choice=choice,
        parallel_calls=b.tool_choice is None or not b.tool_choice.disable_parallel_tool_use,
        max_tokens=b.max_tokens,
        temperature=b.temperature,
        top_p=b.top_p,
        top_k=b.top_k,
        stop=tuple(b.stop_sequences or ()),
        stream=b.stream,
    )
    check(want)
    return want, Messages(b.model)


def _tool(number: int, tool: _Tool) -> dict[str, Any]:
    if tool.input_schema is None or tool.type not in (None, "custom"):
        kind = tool.type or "a tool without input_schema"
        raise Refusal(
            400, f"tools.{number}: only tools with an input_schema are supported, not {kind!r}", param="tools"
        )
    schema_depth(tool.input_schema, f"tools.{number}.input_schema")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _entries(message: _Message, where: str) -> list[Entry]:
    """A message may hold what OpenAI has in several: the results of tools, then text of the user."""
    blocks = message.content
    if isinstance(blocks, str):
        blocks = [_Block("text", text=blocks)]
    if message.role == "assistant":
        text = _text([b for b in blocks if b.type not in ("tool_use", "thinking", "redacted_thinking")], where)
        thoughts = [b.thinking or "" for b in blocks if b.type == "thinking"]
        for b in blocks:
            schema_depth(b.input, f"{where}.input")
        calls = tuple(ToolCall(b.id, b.name, _json(b.input)) for b in blocks if b.type == "tool_use")
        return [Entry("assistant", text, calls, "".join(thoughts) if thoughts else None)]
    if message.role != "user":
        raise Refusal(400, f"{where}.role: expected user or assistant, got {message.role!r}", param=where)
    found: list[Entry] = []
    texts: list[_Block] = []
    for block in blocks:
        if block.type == "tool_result":
            found += _user(texts, where)
            texts = []
            content = block.content if isinstance(block.content, str) else _text(block.content or [], where)
            found.append(Entry("tool", content, call_id=block.tool_use_id))
        else:
            texts.append(block)
    return [*found, *_user(texts, where)] or [Entry("user", "")]


def _user(blocks: Sequence[_Block], where: str) -> list[Entry]:
    return [Entry("user", _text(blocks, where))] if blocks else []


def _text(blocks: Sequence[_Block], where: str) -> str:
    for i, block in enumerate(blocks):
        if block.type != "text" or block.text is None:
            raise Refusal(400, f"{where}.content.{i}: only text is supported here, not {block.type!r}", param=where)
    return "".join(block.text or "" for block in blocks)


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value or {}).decode()
    except (TypeError, ValueError) as error:  # an integer of more than 64 bits
        raise Refusal(400, f"the input of a tool_use cannot be written as JSON: {error}") from error


class Messages:
    """Writes the answer to one request. In a stream, a block opens when something for it comes."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._open: str | None = None
        self._index = -1

    def whole(self, answers: Sequence[Said]) -> bytes:
        said = answers[0]
        content: list[dict[str, Any]] = []
        if said.reasoning is not None:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text or not said.calls:
            content.append({"type": "text", "text": said.text})
        content += [{"type": "tool_use", "id": c.id, "name": c.name, "input": _value(c)} for c in said.calls]
        return orjson.dumps(self._message(content, said))

    def begin(self, n: int) -> bytes:
        return _event("message_start", message=self._message([], None))

    def delta(self, index: int, delta: Delta) -> bytes:
        out = b""
        if delta.reasoning:
            out += self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            out += self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.text:
            out += self._block("text", {"type": "text", "text": ""})
            out += self._delta({"type": "text_delta", "text": delta.text})
        return out

    def end(self, answers: Sequence[Said]) -> bytes:
        said = answers[0]
        out = b""
        for call in said.calls:
            out += self._block(call.id, {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            out += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        out += self._close()
        stop = {"stop_reason": _reason(said), "stop_sequence": said.stopped_at}
        return out + _event("message_delta", delta=stop, usage=_usage(said)) + _event("message_stop")

    def _block(self, name: str, block: dict[str, Any]) -> bytes:
        if self._open == name:
            return b""
        closed = self._close()
        self._open = name
        self._index += 1
        return closed + _event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _message(self, content: list[dict[str, Any]], said: Said | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None if said is None else _reason(said),
            "stop_sequence": None if said is None else said.stopped_at,
            "usage": {"input_tokens": 0, "output_tokens": 0} if said is None else _usage(said),
        }


def _event(kind: str, **data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **data}))


def _usage(said: Said) -> dict[str, int]:
    return {"input_tokens": said.prompt_tokens, "output_tokens": said.sampled_tokens}


def _reason(said: Said) -> str:
    if said.stopped_at is not None and not said.calls:
        return "stop_sequence"
    return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[said.finish]


def _value(call: ToolCall) -> Any:
    return orjson.loads(call.arguments)
