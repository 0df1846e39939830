"""OpenAI's chat completions: what a body means, and what an answer looks like, whole or as a stream of events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ale.proxy.body import check, decode, schema_depth, text_of
from ale.proxy.dialogue import Delta, Entry, Refusal, Role, Said, ToolCall, Want

_MAX_CHOICES = 128
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


class Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: str = "{}"


class _Call(msgspec.Struct):
    function: _Function
    id: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str = ""
    reasoning_content: str | None = None


class _Named(msgspec.Struct):
    name: str


class _Choice(msgspec.Struct):
    function: _Named
    type: str = "function"


class _Schema(msgspec.Struct, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(msgspec.Struct):
    function: _Schema
    type: str = "function"


class _Options(msgspec.Struct):
    include_usage: bool = False


class Asked(msgspec.Struct, kw_only=True):
    """The fields that chat and plain completions have in common."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: _Options | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class _Format(msgspec.Struct, frozen=True):
    type: str = "text"


class _Body(Asked, kw_only=True):
    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: str | _Choice | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    response_format: _Format | None = None
    functions: list[Any] | None = None


_decoder = msgspec.json.Decoder(_Body)


def read(body: bytes) -> tuple[Want, Chat]:
    """What is wanted, and what will write the answer. Raises `Refusal`."""
    b = decode(_decoder, body)
    refuse_what_no_engine_does(b)
    if not b.messages:
        raise Refusal(400, "messages must hold at least one message", param="messages")
    tools = tuple(_tool(i, tool) for i, tool in enumerate(b.tools or ()))
    if isinstance(b.tool_choice, _Choice):
        choice = f"={b.tool_choice.function.name}"
    else:
        choice = b.tool_choice or "auto"
    check_choice(choice, tools)
    want = Want(
        entries=tuple(_entry(i, m) for i, m in enumerate(b.messages)),
        tools=tools,
        tool_choice=choice,
        parallel_calls=b.parallel_tool_calls is not False,
        max_tokens=b.max_completion_tokens if b.max_completion_tokens is not None else b.max_tokens,
        temperature=b.temperature,
        top_p=b.top_p,
        top_k=b.top_k,
        stop=(b.stop,) if isinstance(b.stop, str) else tuple(b.stop or ()),
        seed=b.seed,
        n=1 if b.n is None else b.n,
        logprobs=bool(b.logprobs),
        stream=bool(b.stream),
    )
    check(want)
    return want, Chat(b.model, usage=b.stream_options is not None and b.stream_options.include_usage)


def refuse_what_no_engine_does(body: Any) -> None:
    """A field that would change the answer and cannot be honoured is refused by name, never passed over."""
    refused = {
        "top_logprobs": bool(body.top_logprobs),
        "presence_penalty": bool(body.presence_penalty),
        "frequency_penalty": bool(body.frequency_penalty),
        "logit_bias": bool(body.logit_bias),
        "functions": bool(getattr(body, "functions", None)),
        "response_format": getattr(body, "response_format", None) is not None and body.response_format.type != "text",
    }
    for name, asked in refused.items():
        if asked:
            raise Refusal(400, f"{name} is not supported by this engine", param=name, code="unsupported_parameter")


def check_choice(choice: str, tools: Sequence[dict[str, Any]]) -> None:
    names = {tool["function"]["name"] for tool in tools}
    if choice not in ("auto", "none", "required") and choice[1:] not in names:
        raise Refusal(400, f"tool_choice names no tool of this request: {choice.lstrip('=')!r}", param="tool_choice")
    if choice not in ("auto", "none") and not tools:
        raise Refusal(400, "tool_choice is only allowed when tools are given", param="tool_choice")


def _tool(number: int, tool: _Tool) -> dict[str, Any]:
    if tool.type != "function":
        raise Refusal(400, f"tools[{number}].type: expected 'function', got {tool.type!r}", param=f"tools[{number}]")
    schema_depth(tool.function.parameters, f"tools[{number}].function.parameters")
    return {"type": "function", "function": msgspec.to_builtins(tool.function)}


def _entry(number: int, m: _Message) -> Entry:
    where = f"messages[{number}]"
    role = _ROLES.get(m.role)
    if role is None:
        raise Refusal(400, f"{where}.role: expected one of {', '.join(_ROLES)}, got {m.role!r}", param=f"{where}.role")
    if role == "tool" and not m.tool_call_id:
        raise Refusal(400, f"{where}: a tool message needs a tool_call_id", param=f"{where}.tool_call_id")
    calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in m.tool_calls or ())
    if m.content is None and not calls and role != "assistant":
        raise Refusal(400, f"{where}.content: expected a string or parts of text, got null", param=f"{where}.content")
    return Entry(role, parts_text(m.content, where), calls, m.reasoning_content, m.tool_call_id)


def parts_text(content: str | list[Part] | None, where: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(
        text_of(part.type, part.text or part.refusal, f"{where}.content[{i}]") for i, part in enumerate(content)
    )


class Chat:
    """Writes the answer to one request."""

    done = b"data: [DONE]\n\n"

    def __init__(self, model: str, *, usage: bool) -> None:
        self._usage = usage
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Said]) -> bytes:
        choices = [
            {
                "index": i,
                "message": _message(said),
                "logprobs": _logprobs(said),
                "finish_reason": said.finish,
            }
            for i, said in enumerate(answers)
        ]
        return orjson.dumps({"object": "chat.completion", **self._head, "choices": choices, "usage": usage(answers)})

    def begin(self, n: int) -> bytes:
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(n))

    def delta(self, index: int, delta: Delta) -> bytes:
        new = {"content": delta.text} if delta.text else {}
        if delta.reasoning:
            new["reasoning_content"] = delta.reasoning
        return self._chunk(index, new)

    def end(self, answers: Sequence[Said]) -> bytes:
        events = []
        for i, said in enumerate(answers):
            if said.calls:
                calls = [{"index": k, **_call(call)} for k, call in enumerate(said.calls)]
                events.append(self._chunk(i, {"tool_calls": calls}))
            events.append(self._chunk(i, {}, said.finish, _logprobs(said)))
        if self._usage:
            events.append(
                event({"object": "chat.completion.chunk", **self._head, "choices": [], "usage": usage(answers)})
            )
        return b"".join([*events, self.done])

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({"object": "chat.completion.chunk", **self._head, "choices": [choice]})


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def usage(answers: Sequence[Said]) -> dict[str, Any]:
    prompt, sampled = answers[0].prompt_tokens, sum(said.sampled_tokens for said in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens},
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text or (None if said.calls else "")}
    if said.reasoning is not None:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [_call(call) for call in said.calls]
    return message


def _logprobs(said: Said) -> dict[str, Any] | None:
    if not said.tokens:
        return None
    return {
        "content": [
            {"token": text, "logprob": logp, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logp in said.tokens
        ],
        "refusal": None,
    }
