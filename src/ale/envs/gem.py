"""Environments with GEM's API (arXiv 2510.01051) as tasks: `tasks.source = "gem:game:GuessTheNumber-v0-easy"`.

    reset(seed) -> (observation, info)        step(text) -> (observation, reward, terminated, truncated, info)

A task is a seed. The whole turn is the action (`actions = "text"`): what it means, such as the number in \\boxed{7},
the environment reads itself. The reward of an episode is the sum over its steps.

GEM's environments draw from the global `random` and `numpy.random`. Here each episode has its own: both are swapped in
for every call and put back after it, so that a seed and the actions decide an episode, however many run at once, and
the rest of the program keeps its random numbers. All of them take turns in one thread, off the event loop.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, SupportsFloat

import numpy as np

from ale.config import TasksConfig
from ale.envs.env import Env, Step
from ale.envs.gem_players import player_for
from ale.envs.own import Caller, OwnEnv
from ale.envs.source import Source
from ale.errors import ConfigError, SandboxError, UserError
from ale.task import Split, Task

PREFIX = "gem:"
INSTALL = "pip install reasoning-gym==0.1.23 && pip install --no-deps gem-llm==0.1.0"
# numpy.random.seed takes 32 bits.
_SEEDS = 1 << 32


class GemEnvironment(Protocol):
    """What an environment of GEM has. It is used for one episode."""

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]: ...


MakeGem = Callable[[int], GemEnvironment]
"""Makes the environment for a seed."""

_global_randomness = threading.Lock()


class Game:
    """One episode of a GEM environment with random numbers of its own: the same seed and actions, the same episode."""

    def __init__(self, make: MakeGem, seed: int) -> None:
        self._make = make
        self._seed = seed
        self._environment: GemEnvironment | None = None
        self._states: tuple[Any, Any] = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    def reset(self) -> str:
        with self._own_randomness():
            self._environment = self._make(self._seed)
            observation, info = self._environment.reset(seed=self._seed)
        return _shown(observation, info)

    def step(self, action: str) -> Step:
        if self._environment is None:
            raise RuntimeError("reset() starts the episode; an environment is used for one")
        with self._own_randomness():
            observation, reward, terminated, truncated, info = self._environment.step(action)
        return Step(_shown(observation, info), float(reward), terminated=bool(terminated or truncated))

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        with _global_randomness:
            outside = random.getstate(), np.random.get_state()
            random.setstate(self._states[0])
            np.random.set_state(self._states[1])
            try:
                yield
            finally:
                self._states = random.getstate(), np.random.get_state()
                random.setstate(outside[0])
                np.random.set_state(outside[1])


class GemEpisode:
    """A `Game` that is awaited, an `ale.envs.own.Environment`. A call that never returns holds `thread`."""

    def __init__(self, game: Game, thread: ThreadPoolExecutor) -> None:
        self._game = game
        self._thread = thread

    async def reset(self) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._game.reset)

    async def step(self, action: str) -> Step:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._game.step, action)


def open_gem(config: TasksConfig, seed: int) -> Source:
    """The tasks of `config.source`, an environment of gem-llm. Raises `UserError` when it cannot be made."""
    name = config.source.removeprefix(PREFIX)
    gem = _import_gem()
    if name not in gem.envs.registration.ENV_REGISTRY:
        known = ", ".join(sorted(n for n in gem.envs.registration.ENV_REGISTRY if n.startswith("game:")))
        raise ConfigError(f"tasks.source: gem-llm has no environment {name!r}; its games are {known}.")

    def make(task_seed: int) -> GemEnvironment:
        # Data sets take the seed here, games take it in reset().
        environment: GemEnvironment = gem.make(name, seed=task_seed)
        return environment

    try:
        Game(make, 0).reset()
    except ImportError as error:
        raise UserError(
            f"tasks.source: {name} needs a package that is not installed, see docs/environments.md: {error}"
        ) from error
    except Exception as error:  # what an environment raises that cannot get its data is its own affair
        raise ConfigError(f"tasks.source: {name} cannot be made: {type(error).__name__}: {error}") from error
    return gem_source(make, name, config, seed)


def gem_source(make: MakeGem, name: str, config: TasksConfig, seed: int) -> Source:
    """Tasks of one environment: `config.heldout` seeds that are never drawn for training, then endlessly many others.

    A question (what has one turn, anything but a game) that reads like a held-out one is not drawn either.
    """
    family = name.rpartition(":")[2]
    player = player_for(name)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gem")

    def task(task_seed: int, split: Split) -> Task:
        instruction = Game(make, task_seed).reset()
        solution = (
            player(Game(make, task_seed), random.Random(f"player/{task_seed}")) if player and split == "train" else ()
        )
        return Task(
            id=f"{family}-{task_seed}",
            instruction=instruction,
            files=(),
            tests=(),
            solution=solution,
            actions="text",
            family=family,
            seed=task_seed,
            split=split,
        )

    seeds = random.Random(f"heldout/{config.seed}").sample(range(_SEEDS), config.heldout)
    heldout = tuple(task(s, "heldout") for s in seeds)
    taken = set(seeds)
    asked = set() if name.startswith("game:") else {t.instruction for t in heldout}

    def train() -> Iterator[Task]:
        rng = random.Random(f"train/{seed}")
        while True:
            drawn = rng.randrange(_SEEDS)
            if drawn not in taken and (made := task(drawn, "train")).instruction not in asked:
                yield made

    call = Caller(f"the environment {name}", SandboxError)

    def make_env(task: Task) -> Env:
        return OwnEnv(lambda task: GemEpisode(Game(make, task.seed), thread), task, call)

    return Source(train=train(), heldout=heldout, make_env=make_env)


def _shown(observation: str, info: dict[str, Any]) -> str:
    """As GEM's own observation wrapper shows it: between the hints that the environment sends along."""
    suffix = info.get("suffix", "")
    newline = "\n" if suffix and not observation.endswith("\n") else ""
    return f"{info.get('prefix', '')}{observation}{newline}{suffix}"


def _import_gem() -> Any:
    """The package `gem`. It sets up logging for the whole program on import; that is undone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        gem = importlib.import_module("gem")
        importlib.import_module("gem.envs")
    except ImportError as error:
        raise UserError(
            f"tasks.source: environments of GEM need packages that are not installed ({error}): {INSTALL}"
        ) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return gem
