"""The environment port, with GEM's semantics: reset, step, score, close. An environment is used for one episode.

What an action is, the task says (`Task.actions`); turns are parsed before they come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ale.messages import Score, ToolResult
from ale.task import Task


class Step(msgspec.Struct, frozen=True):
    """`Step(observation="a.txt", result=ToolResult("ls", "a.txt", 0))`: what came of one action.

    `terminated`: the environment itself ended the episode. `result` is the entry for the trajectory's log.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    result: ToolResult | None = None


class Env(Protocol):
    async def reset(self) -> str:
        """Starts the episode and returns the instruction."""

    async def step(self, action: str) -> Step:
        """Carries out one action, once. Raises `SandboxError` when the environment itself failed."""

    async def score(self) -> Score:
        """The terminal reward. Raises `EvaluatorError` when it cannot be trusted. Ends the episode."""

    async def close(self) -> None:
        """Releases everything. Idempotent."""


MakeEnv = Callable[[Task], Env]
"""Makes the environment of one episode. It acquires nothing: that is for `reset`."""
