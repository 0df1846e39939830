"""A `Policy` without a model: it says the lines of a script, with log-probabilities that a test can predict."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ale.errors import PolicyError
from ale.messages import Generate, Turn
from ale.wire import Array


class Speaker(Protocol):
    """What of `ale.agent.chat.Chat` the script needs."""

    def spoken(self, text: str) -> list[int]:
        """The tokens of a turn that says `text`, the end-of-turn token last."""


class ScriptedPolicy:
    """`ScriptedPolicy(chat, "```bash\\nls\\n```", "done")`: the n-th turn of every session says the n-th line.

    A turn is cut at `max_tokens`, as an engine would. An exception in the script is raised in its turn; a session that
    goes on past its end raises `PolicyError`. `requests`, `turns` and `ended` record what happened, in order.
    """

    def __init__(self, speaker: Speaker, *script: str | Exception, version: int = 0) -> None:
        self.version = version
        self.requests: list[Generate] = []
        self.turns: list[Turn] = []
        self.ended: list[str] = []
        self._speaker = speaker
        self._script = script
        self._spoken: dict[str, int] = {}

    async def generate(self, request: Generate) -> Turn:
        self.requests.append(request)
        number = self._spoken.get(request.session, 0)
        self._spoken[request.session] = number + 1
        if number >= len(self._script):
            raise PolicyError(f"the script has {len(self._script)} turns; {request.session} asked for one more")
        line = self._script[number]
        if isinstance(line, Exception):
            raise line
        said = self._speaker.spoken(line)
        tokens = said[: request.sampling.max_tokens]
        logp_A = logp_of(number, len(tokens))
        turn = Turn(
            tokens_A=Array.of(tokens, "int32"),
            logp_A=logp_A,
            logp_sampled_A=logp_A,
            version_A=Array.of([self.version] * len(tokens), "int32"),
            finish="length" if len(said) > len(tokens) else "stop",
        )
        self.turns.append(turn)
        return turn

    async def end_session(self, session: str) -> None:
        self.ended.append(session)
        self._spoken.pop(session, None)

    async def load_weights(self, version: int, slot: int) -> None:
        self.version = version


def logp_of(turn: int, tokens: int) -> Array:
    """The log-probabilities of a turn, float32 [A]: -(turn + 1) - i/256, so that each is exact and tells its place."""
    return Array.of(-(turn + 1) - np.arange(tokens) / 256, "float32")
