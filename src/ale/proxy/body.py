"""Reading a request's body: a mistake of any kind becomes a `Refusal` that names the field."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ale.proxy.dialogue import Refusal, Want

T = TypeVar("T")

_MAX_DEPTH = 64
_MAX_CHOICES = 16
_MAX_STOPS = 16


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        _, _, where = str(error).partition(" - at `$")
        raise Refusal(400, str(error), param=where.strip("`.") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise Refusal(400, "the body is nested too deeply") from error


def check(want: Want) -> None:
    """The ranges that every API shares; comparisons are written so that NaN fails them."""
    rules: tuple[tuple[str, bool, str], ...] = (
        ("max_tokens", want.max_tokens is None or 1 <= want.max_tokens < 2**31, "at least 1"),
        ("temperature", want.temperature is None or 0 <= want.temperature <= 2, "between 0 and 2"),
        ("top_p", want.top_p is None or 0 < want.top_p <= 1, "above 0 and at most 1"),
        ("top_k", want.top_k is None or 1 <= want.top_k < 2**31, "at least 1"),
        ("n", 1 <= want.n <= _MAX_CHOICES, f"between 1 and {_MAX_CHOICES}"),
        ("stop", len(want.stop) <= _MAX_STOPS and all(want.stop), f"at most {_MAX_STOPS} strings, none empty"),
        ("seed", want.seed is None or abs(want.seed) < 2**63, "a number of 64 bits"),
    )
    for name, holds, expected in rules:
        if not holds:
            raise Refusal(400, f"{name}: expected {expected}, got {getattr(want, name)!r}", param=name)
    for entry in want.entries:
        for text in (entry.text, entry.reasoning or ""):
            if not text.isascii():
                check_text(text)
    for stop in want.stop:
        check_text(stop)


def check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"a text holds half of a surrogate pair: {error.reason}") from error


def text_of(kind: str, text: str | None, where: str) -> str:
    """The text of one part of a message's content."""
    if kind not in ("text", "input_text", "output_text", "refusal") or text is None:
        raise Refusal(400, f"{where}: only parts of text are supported, not {kind!r}", param=where)
    return text


def schema_depth(value: Any, where: str, depth: int = 0) -> None:
    """Templates write schemas out recursively; nobody means one as deep as this."""
    if depth > _MAX_DEPTH:
        raise Refusal(400, f"{where} is nested more than {_MAX_DEPTH} levels deep", param=where)
    if isinstance(value, int | float) and not abs(value) < 2**63:
        raise Refusal(400, f"{where} holds a number that does not fit into 64 bits", param=where)
    if isinstance(value, str):
        check_text(value)
    for key in value if isinstance(value, dict) else ():
        check_text(key)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        schema_depth(inner, where, depth + 1)
