"""The policy port: whatever turns tokens into tokens. The embedded engine is one; a vLLM server can be another."""

from __future__ import annotations

from typing import Protocol

from ale.messages import Generate, Turn


class Policy(Protocol):
    """Token ids in, sampled token ids out, with what each was sampled from. Nothing is re-tokenised."""

    @property
    def version(self) -> int:
        """The version that the next token will be sampled from."""

    async def generate(self, request: Generate) -> Turn:
        """Continues a prompt. Raises `PolicyError`."""

    async def end_session(self, session: str) -> None:
        """Forgets an episode and abandons its turn, if one is being generated."""

    async def load_weights(self, version: int, slot: int) -> None:
        """From the next token on, sample from these weights. Turns in flight go on; their tokens name their version."""
