"""The dialogue, and how it is kept within the model's window.

At a set share of the window it is made shorter, in two steps. First without loss: old results that are repeated, or
long, give way to a line that says where the same text stands, in the dialogue or in a file that the model can read.
Only then does the model itself sum up what happened, and the dialogue goes on from the goal, the summary and the last
messages. A call is never parted from its results.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from msgspec import structs

from ale.agent.events import Compacted
from ale.agent.model import Message, Model, Request, ToolSpec, Usage
from ale.agent.settings import ContextSettings
from ale.agent.tokens import Counter
from ale.errors import ConfigError, PolicyError

# A result shorter than this is not worth a line in its place.
_WORTH_CHARS = 400
# Down to this share of the limit, so that the next turns have room.
_TARGET = 0.6
_SUMMARISE = """\
The dialogue becomes too long and will be replaced by your summary. Write down all that is needed to go on without \
it: what was found out (with paths, names, commands and exact values), what was done and checked, what failed and why, \
what is under way, and what is left to do. Do not call a tool."""
_SHORTER = "Your last attempt was too long and was cut: use at most half as many words, the most important first."

Keep = Callable[[str], Awaitable[str]]


class WindowTooSmall(PolicyError):
    """What may not be given up is longer than the window."""


class Context:
    """`messages` is what the model sees. `keep(text)` keeps a text in the workspace and returns its path."""

    def __init__(
        self,
        counter: Counter,
        settings: ContextSettings,
        *,
        window: int,
        answer_tokens: int,
        tools: tuple[ToolSpec, ...],
        keep: Keep,
        messages: Sequence[Message] = (),
    ) -> None:
        self.messages = list(messages)
        self._counter, self._settings, self._tools, self._keep = counter, settings, tools, keep
        self._limit = min(int(window * settings.compress_at), window - answer_tokens)
        if self._limit < 1:
            raise ConfigError(
                f"agent.model.window is {window} tokens, and agent.model.max_tokens {answer_tokens}: no prompt fits."
            )

    def add(self, message: Message) -> None:
        self.messages.append(message)

    async def tokens(self) -> int:
        return await asyncio.to_thread(self._counter.count, tuple(self.messages), self._tools)

    def learn(self, prompt_tokens: int) -> None:
        """The server's count of the prompt that was just answered; call it before the answer is added."""
        self._counter.learn(self.messages, self._tools, prompt_tokens)

    async def fit(self, model: Model, goal: Callable[[str], str], *, overflowed: bool = False) -> list[Compacted]:
        """Makes the dialogue shorter if it is too long, and says how.

        `goal(summary)` is the message that begins the dialogue anew. `overflowed`: the server refused the prompt,
        whatever was counted. Raises `PolicyError` when it cannot be made short enough.
        """
        before = await self.tokens()
        if before <= self._limit and not overflowed:
            return []
        done: list[Compacted] = []
        if await self._collapse():
            after = await self.tokens()
            done.append(self._compacted("collapsed", before, after))
            if after <= self._limit and not overflowed:
                return done
            before = after
        usage = await self._summarise(model, goal)
        after = await self.tokens()
        if after > self._limit:
            raise WindowTooSmall(
                f"{after} tokens are left after the dialogue was summed up, and {self._limit} fit: the task, the tools "
                "or the last results are too long for agent.model.window"
            )
        return [*done, self._compacted("summarised", before, after, usage)]

    def _compacted(
        self, how: Literal["collapsed", "summarised"], before: int, after: int, usage: Usage | None = None
    ) -> Compacted:
        return Compacted(how=how, messages=tuple(self.messages), tokens_before=before, tokens_after=after, usage=usage)

    # -- without loss

    async def _collapse(self) -> bool:
        """Shortens old results, repeated ones first; whether there were any."""
        old = range(self._first_recent())
        changed = False
        last: dict[str, int] = {}
        for at, message in enumerate(self.messages):
            if message.role == "tool" and len(message.content) >= _WORTH_CHARS:
                last[message.content] = at
        for at in old:
            message = self.messages[at]
            if message.role == "tool" and (again := last.get(message.content, at)) != at:
                self.messages[at] = structs.replace(
                    message, content=f"[the same as the later result of {self.messages[again].call_id}]"
                )
                changed = True
        target = int(self._limit * _TARGET)
        if changed and await self.tokens() <= target:
            return True
        for at in range(self._last_turn()):
            message = self.messages[at]
            if message.role != "tool" or len(message.content) < _WORTH_CHARS:
                continue
            if at >= len(old) and await self.tokens() <= self._limit:
                break  # recent results give way only where they must
            try:
                path = await self._keep(message.content)
            except OSError:  # the workspace is full: what cannot be kept stays, and a summary has to do
                break
            first = message.content.split("\n", 1)[0][:200]
            self.messages[at] = structs.replace(
                message, content=f"{first}\n[{len(message.content)} characters in all: read {path} for the rest]"
            )
            changed = True
            if await self.tokens() <= target:
                break
        return changed

    def _last_turn(self) -> int:
        """Where the model's last turn begins, whose results it has not seen yet."""
        turns = [at for at, message in enumerate(self.messages) if message.role == "assistant"]
        return turns[-1] if turns else self._head()

    def _first_recent(self) -> int:
        """Where the untouched end begins: never between a call and its results."""
        at = max(self._head(), len(self.messages) - self._settings.keep_recent)
        while at > self._head() and self.messages[at : at + 1] and self.messages[at].role == "tool":
            at -= 1
        return at

    def _head(self) -> int:
        """How many messages at the front are the system prompt."""
        return int(bool(self.messages) and self.messages[0].role == "system")

    # -- by the model

    async def _summarise(self, model: Model, goal: Callable[[str], str]) -> Usage | None:
        asked = Message("user", _SUMMARISE)
        shown = await self._shown_with(asked)
        reply = await model.complete(Request(shown, self._tools, calls_allowed=False))
        usage = reply.usage
        if reply.finish == "length":  # what it left out would be lost without a word
            shown = await self._shown_with(Message("user", f"{_SUMMARISE} {_SHORTER}"))
            reply = await model.complete(Request(shown, self._tools, calls_allowed=False))
            usage = reply.usage if usage is None else usage + (reply.usage or Usage())
        summary = reply.message.content.strip()
        if not summary:
            raise PolicyError(f"{model.name} was asked to sum up the dialogue, and said nothing")
        if reply.finish == "length":
            raise PolicyError(
                f"{model.name} was asked to sum up the dialogue, twice, and was cut at its token limit: raise "
                "agent.model.max_tokens"
            )
        head, first = self._head(), self._first_recent()
        if first <= head:  # one turn alone fills the window: nothing of it can stay
            first = len(self.messages)
        self.messages = [*self.messages[:head], Message("user", goal(summary)), *self.messages[first:]]
        if await self.tokens() > self._limit:  # the last messages are themselves too long
            self.messages = self.messages[: head + 1]
        return usage

    async def _shown_with(self, asked: Message) -> tuple[Message, ...]:
        """The dialogue and the question, the longest results cut until they fit where they do not."""
        shown = [*self.messages, asked]
        while await asyncio.to_thread(self._counter.count, tuple(shown), self._tools) > self._limit + self._room():
            longest = max(
                (at for at, m in enumerate(shown) if m.role in ("tool", "assistant") and not m.calls),
                key=lambda at: len(shown[at].content),
                default=None,
            )
            if longest is None or len(shown[longest].content) < _WORTH_CHARS:
                break  # the server will say what is too long
            content = shown[longest].content
            quarter = len(content) // 4
            shown[longest] = structs.replace(
                shown[longest], content=f"{content[:quarter]}\n[... cut for the summary ...]\n{content[-quarter:]}"
            )
        return tuple(shown)

    def _room(self) -> int:
        """Above the limit there is still this much of the window for the question."""
        return len(_SUMMARISE) // 3
