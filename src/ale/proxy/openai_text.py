"""OpenAI's plain completions: a text or token ids to continue, without any chat template."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ale.proxy.body import check, check_text, decode
from ale.proxy.dialogue import Delta, Refusal, Said, Want
from ale.proxy.openai_chat import Asked, Chat, event, refuse_what_no_engine_does, usage


class _Body(Asked, kw_only=True):
    prompt: str | list[int | str]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


_decoder = msgspec.json.Decoder(_Body)


def read(body: bytes) -> tuple[Want, Text]:
    b = decode(_decoder, body)
    refuse_what_no_engine_does(b)
    for name, asked in (("echo", b.echo), ("suffix", b.suffix), ("best_of", (b.best_of or 1) > (b.n or 1))):
        if asked:
            raise Refusal(400, f"{name} is not supported by this engine", param=name, code="unsupported_parameter")
    if b.logprobs is not None and b.logprobs > 1:
        raise Refusal(400, "logprobs: the sampled token's own is recorded, no others: use 0 or 1", param="logprobs")
    want = Want(
        prompt=_prompt(b.prompt),
        max_tokens=b.max_tokens,
        temperature=b.temperature,
        top_p=b.top_p,
        top_k=b.top_k,
        stop=(b.stop,) if isinstance(b.stop, str) else tuple(b.stop or ()),
        seed=b.seed,
        n=1 if b.n is None else b.n,
        logprobs=b.logprobs is not None,
        stream=bool(b.stream),
    )
    check(want)
    return want, Text(b.model, usage=b.stream_options is not None and b.stream_options.include_usage)


def _prompt(prompt: str | list[int | str]) -> str | tuple[int, ...]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        check_text(prompt)
        return prompt
    ids = tuple(token for token in prompt if isinstance(token, int))
    if len(ids) != len(prompt):
        raise Refusal(400, "prompt: expected one text or the ids of its tokens", param="prompt")
    if not all(0 <= token < 2**31 for token in ids):
        raise Refusal(400, "prompt holds ids that no vocabulary has", param="prompt")
    return ids


class Text:
    """Writes the answer to one request."""

    def __init__(self, model: str, *, usage: bool) -> None:
        self._usage = usage
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Said]) -> bytes:
        choices = [_choice(i, said.text, said.finish, said) for i, said in enumerate(answers)]
        return orjson.dumps({**self._head, "choices": choices, "usage": usage(answers)})

    def begin(self, n: int) -> bytes:
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        return event({**self._head, "choices": [_choice(index, delta.text, None, None)]})

    def end(self, answers: Sequence[Said]) -> bytes:
        events = [event({**self._head, "choices": [_choice(i, "", s.finish, s)]}) for i, s in enumerate(answers)]
        if self._usage:
            events.append(event({**self._head, "choices": [], "usage": usage(answers)}))
        return b"".join([*events, Chat.done])


def _choice(index: int, text: str, finish: str | None, said: Said | None) -> dict[str, Any]:
    logprobs = None
    if said is not None and said.tokens:
        offsets, at = [], 0
        for token, _ in said.tokens:
            offsets.append(at)
            at += len(token)
        logprobs = {
            "tokens": [token for token, _ in said.tokens],
            "token_logprobs": [logp for _, logp in said.tokens],
            "text_offset": offsets,
            "top_logprobs": None,
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
