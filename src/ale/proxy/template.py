"""From a dialogue to token ids by the model's own chat template, each piece of text encoded once.

A template is rendered with a mark in place of every message's text. What stands between the marks is the template's own
(special tokens are read as such); what goes in at a mark comes from outside and is encoded with special tokens read as
plain text, so that a file cannot forge the end of a turn; or it is a turn that the policy sampled, as the ids it is.
What a template writes around a sequence of roles does not depend on the texts, so it is rendered once and kept.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import orjson

from ale.errors import ModelError
from ale.proxy.dialogue import Refusal

T = TypeVar("T")

_MARK = re.compile(r"aleSlot(\d+)End")
_SKELETONS = 512
_TEXTS_CHARS = 8_000_000  # of encoded text that is kept: group members share prompts, retries repeat all of it


class Slot(msgspec.Struct, frozen=True):
    """What stands at one message: its role, its token ids, and whether they hold the end-of-turn token."""

    role: str
    tokens: Sequence[int]
    ended: bool = False


class _Skeleton(msgspec.Struct, frozen=True):
    """`pieces[0] slot[order[0]] pieces[1] slot[order[1]] ... pieces[n]`; `ends[i]`: an end token follows slot i."""

    pieces: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    ends: tuple[bool, ...]


class ChatTemplate:
    """For one tokenizer. Raises `ModelError` when its template cannot be used at all, `Refusal` for one dialogue."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer names no end-of-turn token (eos_token)")
        self.end: int = tokenizer.eos_token_id
        self._eos: str = tokenizer.eos_token
        self._special = tuple(str(t) for t in tokenizer.all_special_tokens)
        self._skeletons: OrderedDict[object, _Skeleton] = OrderedDict()
        self._texts: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._texts_chars = 0
        source = str(tokenizer.chat_template)
        self.thinks = "</think>" in source
        self.calls_in_tags = "<tool_call>" in source
        try:
            self._following(("user",))
        except Refusal as refusal:
            raise ModelError(f"the chat template cannot be used: {refusal.message}") from refusal
        try:
            self._following(("tool",))
            self._tool_role = "tool"
        except Refusal:  # it knows no tool role: results come from the user
            self._tool_role = "user"
        self.opens_thought = self._opens_thought()

    def opening(self, slots: Sequence[Slot], tools: Sequence[dict[str, Any]]) -> list[int]:
        """The prompt of a dialogue from its very beginning, the start of the assistant's turn included."""
        roles = self._roles(slots)
        schemas = orjson.dumps(tools) if tools else b""
        skeleton = self._kept((roles, schemas), lambda: self._whole(roles, tools, schemas))
        return self._fill(skeleton, slots)

    def following(self, slots: Sequence[Slot], *, ended: bool) -> list[int]:
        """What is appended to a turn of the policy. `ended`: the policy sampled the end-of-turn token itself."""
        roles = self._roles(slots)
        skeleton = self._kept(roles, lambda: self._following(roles))
        return [*([] if ended else [self.end]), *self._fill(skeleton, slots)]

    def outside(self, text: str) -> tuple[int, ...]:
        """The tokens of a text from outside; special tokens in it are plain text. Kept, within a bound."""
        found = self._texts.get(text)
        if found is not None:
            self._texts.move_to_end(text)
            return found
        try:
            ids = tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise Refusal(400, f"a text is not valid Unicode: {error}") from error
        self._texts[text] = ids
        self._texts_chars += len(text)
        while self._texts_chars > _TEXTS_CHARS:
            old, _ = self._texts.popitem(last=False)
            self._texts_chars -= len(old)
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """What the policy said, without the end-of-turn token."""
        said = tokens[:-1] if tokens and tokens[-1] == self.end else tokens
        return str(self._tokenizer.decode(list(said), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _roles(self, slots: Sequence[Slot]) -> tuple[str, ...]:
        return tuple(self._tool_role if slot.role == "tool" else slot.role for slot in slots)

    def _opens_thought(self) -> bool:
        """Whether the template itself begins every turn with `<think>`, so that no turn says it."""
        if not self.thinks:
            return False
        text = self._render([{"role": "user", "content": "u"}], generate=True)
        return text.rstrip().endswith("<think>")

    def _whole(self, roles: Sequence[str], tools: Sequence[dict[str, Any]], schemas: bytes) -> _Skeleton:
        if schemas and any(special.encode() in schemas for special in self._special):
            raise Refusal(400, "a tool's schema holds one of the model's special tokens", param="tools")
        messages = [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
        return self._skeleton(self._render(messages, tools, generate=True), roles)

    def _following(self, roles: Sequence[str]) -> _Skeleton:
        """The pieces after the end of a turn: that turn's own text and what precedes it do not matter."""
        head = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "aleTurn"}]
        messages = [{"role": role, "content": _mark(i)} for i, role in enumerate(roles)]
        text = self._render([*head, *messages], generate=True)
        _, _, after = text.partition("aleTurn")
        between, found, tail = after.partition(self._eos)
        if not found or between.strip() or text.count("aleTurn") != 1:
            raise Refusal(400, f"the chat template does not end an assistant turn with {self._eos!r}")
        return self._skeleton(tail, roles)

    def _skeleton(self, text: str, roles: Sequence[str]) -> _Skeleton:
        parts = _MARK.split(text)
        order = tuple(int(number) for number in parts[1::2])
        if sorted(order) != list(range(len(roles))):
            raise Refusal(
                400,
                f"the model's chat template does not show every message exactly once ({', '.join(roles) or 'none'})",
                param="messages",
            )
        pieces, ends = [self._template(parts[0])], []
        for slot, piece in zip(order, parts[2::2], strict=True):
            stripped = piece.lstrip()
            ends.append(roles[slot] == "assistant" and stripped.startswith(self._eos))
            pieces.append(self._template(stripped[len(self._eos) :] if ends[-1] else piece))
        return _Skeleton(tuple(pieces), order, tuple(ends))

    def _fill(self, skeleton: _Skeleton, slots: Sequence[Slot]) -> list[int]:
        tokens = list(skeleton.pieces[0])
        for i, ends, piece in zip(skeleton.order, skeleton.ends, skeleton.pieces[1:], strict=True):
            tokens += slots[i].tokens
            if ends and not slots[i].ended:
                tokens.append(self.end)
            tokens += piece
        return tokens

    def _kept(self, key: object, make: Callable[[], _Skeleton]) -> _Skeleton:
        found = self._skeletons.get(key)
        if found is None:
            found = self._skeletons[key] = make()
            if len(self._skeletons) > _SKELETONS:
                self._skeletons.popitem(last=False)
        else:
            self._skeletons.move_to_end(key)
        return found

    def _render(self, messages: list[dict[str, str]], tools: Sequence[Any] = (), *, generate: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=generate
                )
            )
        except Exception as error:  # templates raise whatever they like
            roles = ", ".join(m["role"] for m in messages)
            raise Refusal(400, f"the model's chat template cannot render {roles}: {error}", param="messages") from error

    def _template(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def _mark(number: int) -> str:
    return f"aleSlot{number}End"
