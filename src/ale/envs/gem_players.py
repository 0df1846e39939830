"""Players that solve GEM's games, for the demonstrations of a warm start: not the best play, but moves that make sense.

A player sees what the agent sees. It returns its turns, and () where they did not win: what fails is not shown.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Protocol

from ale.envs.env import Step

SOLVED = 1.0
"""The reward of a game that was won (LanguageGameReward.success_reward)."""


class Playable(Protocol):
    def reset(self) -> str: ...

    def step(self, action: str) -> Step: ...


Player = Callable[[Playable, random.Random], tuple[str, ...]]


def guess_the_number(game: Playable, rng: random.Random) -> tuple[str, ...]:
    """Guesses any of the numbers still possible. Halving them instead is left for the agent to find out."""
    bounds = re.search(r"between (\d+) and (\d+)", game.reset())
    if bounds is None:
        return ()
    low, high = int(bounds[1]), int(bounds[2])
    turns: list[str] = []
    while low <= high:
        guess = rng.randint(low, high)
        turns.append(f"\\boxed{{{guess}}}")
        step = game.step(turns[-1])
        if step.terminated:
            return tuple(turns) if step.reward >= SOLVED else ()
        if "higher" in step.observation:
            low = guess + 1
        else:
            high = guess - 1
    return ()


PLAYERS: dict[str, Player] = {"game:GuessTheNumber": guess_the_number}


def player_for(name: str) -> Player | None:
    """The player of an environment, whatever its difficulty: "game:GuessTheNumber-v0-easy" has one."""
    return PLAYERS.get(name.partition("-v")[0])
