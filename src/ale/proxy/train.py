"""Mode *train*: every API is answered by the run's own policy, with its exact tokens on record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ale.proxy import anthropic_messages, openai_chat, openai_responses, openai_text
from ale.proxy.app import EVENTS, Call, Out
from ale.proxy.dialogue import Delta, Said, Want
from ale.proxy.episode import Episode
from ale.proxy.native import Emit, Native
from ale.proxy.tree import TokenTree


class Writer(Protocol):
    """Writes one answer in the shape of its API."""

    def whole(self, answers: Sequence[Said]) -> bytes: ...

    def begin(self, n: int) -> bytes: ...

    def delta(self, index: int, delta: Delta) -> bytes: ...

    def end(self, answers: Sequence[Said]) -> bytes: ...


READERS: dict[str, Callable[[bytes], tuple[Want, Writer]]] = {
    "/v1/chat/completions": openai_chat.read,
    "/v1/completions": openai_text.read,
    "/v1/messages": anthropic_messages.read,
    "/v1/responses": openai_responses.read,
}


class Train:
    def __init__(self, native: Native) -> None:
        self._native = native

    def tree(self) -> TokenTree | None:
        return self._native.tree()

    async def respond(self, episode: Episode, call: Call, out: Out) -> None:
        want, writer = READERS[call.path](call.body)
        if not want.stream:
            return await out.whole(200, writer.whole(await self._native.answer(episode, want, None)))

        async def show(index: int, delta: Delta) -> None:
            # The status goes out with the first token: what fails before it can still be told by a status.
            if not out.status:
                await out.start(200, EVENTS, ((b"cache-control", b"no-cache"),))
                await out.write(writer.begin(want.n))
            await out.write(writer.delta(index, delta))

        def emit(index: int) -> Emit:
            return lambda delta: show(index, delta)

        answers = await self._native.answer(episode, want, [emit(i) for i in range(want.n)])
        if not out.status:
            await out.start(200, EVENTS, ((b"cache-control", b"no-cache"),))
            await out.write(writer.begin(want.n))
        await out.write(writer.end(answers))
        await out.end()
        return None

    async def end(self, episode: Episode) -> None:
        await self._native.end(episode)
