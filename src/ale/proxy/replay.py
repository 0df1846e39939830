"""Mode *replay*: a recorded episode answers, byte for byte, so that an agent can be debugged without a model."""

from __future__ import annotations

from pathlib import Path

from ale.proxy.app import Call, Out
from ale.proxy.dialogue import Refusal
from ale.proxy.episode import Episode
from ale.proxy.journal import Recorded
from ale.proxy.tree import TokenTree


class Replay:
    """One journal for all who ask: each recorded answer is given once."""

    def __init__(self, journal: Path) -> None:
        self._recorded = Recorded(journal)

    def tree(self) -> TokenTree | None:
        return None

    async def respond(self, episode: Episode, call: Call, out: Out) -> None:
        exchange = self._recorded.next(call.path, call.body)
        if exchange is None:
            raise Refusal(409, "the journal holds no (further) answer to this request", code="not_recorded")
        await out.start(exchange.status, exchange.content_type)
        for piece in exchange.pieces:
            await out.write(piece.encode())
        await out.end()

    async def end(self, episode: Episode) -> None:
        pass
