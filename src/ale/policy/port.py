"""The policy port: whatever turns tokens into tokens. The embedded engine is one, a number of vLLM servers another."""

from __future__ import annotations

from typing import Protocol

from ale.messages import EngineStatistics, Generate, Turn


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
        """From the next token on, sample from these weights, which are the learner's newest and stand in this slot of
        the ring. Turns in flight go on; their tokens name their version."""


class OpenPolicy(Policy, Protocol):
    """One that a run has opened."""

    async def statistics(self) -> EngineStatistics:
        """How busy it is. Raises `PolicyError`, `WorkerDied` or `DeadlineExceeded`."""

    def counters(self) -> dict[str, float]:
        """What went wrong and was mended since it was opened, for the record of an update."""


class KeptPolicy(OpenPolicy, Protocol):
    """One whose processes are brought back when they die."""

    async def watch(self) -> None:
        """Raises when it was given up. Somebody has to own it: an episode takes what the policy says as its own end."""
