"""What a program brings into a run, behind our ports: an environment of its own, a reward function of its own.

    class Guess:                                   def short(trajectory: Trajectory) -> float:
        def __init__(self, task: Task): ...            return 1.0 / len(trajectory.results)
        def reset(self) -> str: ...
        def step(self, action: str) -> Step: ...

Either may be plain or `async def`. A plain one runs on the event loop, so it takes milliseconds; what takes longer is
`async def`. An exception in it is not an answer: the rollout is dropped with that cause and another one started, never
scored 0. Code that has not worked a single time is a mistake of the program and ends the run with that mistake.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Any, Protocol

import msgspec

from ale.config import TasksConfig
from ale.envs.env import Step
from ale.envs.source import Source, split
from ale.errors import AleError, ConfigError, EvaluatorError, SandboxError
from ale.messages import Score, ToolResult, Trajectory
from ale.task import Split, Task

# So many failures without one success are no bad luck.
PATIENCE = 16


class Environment(Protocol):
    """One episode. `score()` and `close()` are optional: without `score` the reward is the sum over the steps."""

    def reset(self) -> str | Awaitable[str]:
        """Starts the episode and returns what the agent is told."""

    def step(self, action: str) -> Step | Awaitable[Step]:
        """Carries out one action: the whole text of a turn. `terminated` ends the episode."""


RewardFunction = Callable[[Trajectory], "float | Awaitable[float]"]


class Caller:
    """Calls code that is not ours, awaits it where it is asynchronous, and names its errors after the boundary."""

    def __init__(self, name: str, error: type[AleError]) -> None:
        self._name = name
        self._error = error
        self._worked = False
        self._failures = 0

    async def __call__(self, function: Callable[..., Any], *arguments: Any, check: Callable[[Any], Any]) -> Any:
        """What `check` makes of the answer; a wrong answer raises there. Raises the boundary's error, or
        `ConfigError` when nothing has ever worked."""
        try:
            answer = function(*arguments)
            if inspect.isawaitable(answer):
                answer = await answer
            answer = check(answer)
        except Exception as error:
            said = f"{self._name}: {type(error).__name__}: {error}"
            self._failures += 1
            if not self._worked and self._failures >= PATIENCE:
                raise ConfigError(f"{said}. It has failed {self._failures} times and never worked.") from error
            raise self._error(said) from error
        self._worked = True
        return answer


class OwnEnv:
    """The port `ale.envs.env.Env` in front of an `Environment`."""

    def __init__(self, make: Callable[[Task], Environment], task: Task, call: Caller) -> None:
        self._make = make
        self._task = task
        self._call = call
        self._environment: Environment | None = None
        self._reward = 0.0

    async def reset(self) -> str:
        self._environment = await self._call(self._make, self._task, check=_as_it_is)
        told: str = await self._call(self._live().reset, check=_text)
        return told

    async def step(self, action: str) -> Step:
        step: Step = await self._call(self._live().step, action, check=_step)
        self._reward += step.reward
        if step.result is not None:
            return step
        result = ToolResult(call=action, output=step.observation, exit_code=0)
        return Step(step.observation, step.reward, step.terminated, result)

    async def score(self) -> Score:
        own = getattr(self._live(), "score", None)
        if own is None:
            return Score(reward=self._reward)
        reward: float = await self._call(own, check=_reward)
        return Score(reward=reward)

    async def close(self) -> None:
        environment, self._environment = self._environment, None
        if (own := getattr(environment, "close", None)) is not None:
            await self._call(own, check=_as_it_is)

    def _live(self) -> Environment:
        if self._environment is None:
            raise RuntimeError("reset() starts the episode; an environment is used for one")
        return self._environment


def own_reward(function: RewardFunction) -> Callable[[Trajectory], Awaitable[float]]:
    """The `judge` of a run whose rewards are `function(trajectory)`."""
    call = Caller(f"the reward function {_name(function)}", EvaluatorError)

    async def judge(trajectory: Trajectory) -> float:
        reward: float = await call(function, trajectory, check=_reward)
        return reward

    return judge


def own_source(
    tasks: Iterable[Task] | None,
    environment: Callable[[Task], Environment] | None,
    config: TasksConfig,
    seed: int,
) -> Source | None:
    """The tasks and environments that a program brings; None when it brings neither. Raises `ConfigError`.

    Tasks are split by `config.heldout`, as a directory of tasks is; an environment without tasks gets numbers.
    """
    if environment is None:
        return None if tasks is None else _split(list(tasks), config, seed)
    call = Caller(f"the environment {_name(environment)}", SandboxError)
    if tasks is None:
        source = _numbers(_name(environment).lower(), config, seed)
    else:
        source = _split([msgspec.structs.replace(task, actions="text") for task in tasks], config, seed)
    return msgspec.structs.replace(source, make_env=lambda task: OwnEnv(environment, task, call))


def _split(tasks: list[Task], config: TasksConfig, seed: int) -> Source:
    seen = set[str]()
    for task in tasks:
        if task.id in seen:
            raise ConfigError(f"tasks: two of them have the id {task.id!r}; an id names one task.")
        seen.add(task.id)
    return split(tasks, config, seed, where="tasks")


def _numbers(name: str, config: TasksConfig, seed: int) -> Source:
    """An endless source of `task.seed`; the held-out ones come first and are never drawn. Training starts at another
    number for each seed of the run, 2^32 apart."""

    def task(number: int, split: Split) -> Task:
        return Task(
            id=f"{name}-{number}",
            actions="text",
            family=name,
            seed=number,
            split=split,
        )

    return Source(
        train=(task(number, "train") for number in count(config.heldout + (seed << 32))),
        heldout=tuple(task(number, "heldout") for number in range(config.heldout)),
    )


def _name(thing: Any) -> str:
    return str(getattr(thing, "__name__", type(thing).__name__))


def _as_it_is(answer: Any) -> Any:
    return answer


def _text(answer: Any) -> str:
    if not isinstance(answer, str):
        raise TypeError(f"reset() returns what the agent is told, a str, not {answer!r}")
    return answer


def _step(answer: Any) -> Step:
    if not isinstance(answer, Step) or not isinstance(answer.observation, str):
        raise TypeError(f'step() returns ale.Step("observation", ...), not {answer!r}')
    _reward(answer.reward)
    return answer


def _reward(answer: Any) -> float:
    value = answer.reward if isinstance(answer, Score) else answer
    if value is None or isinstance(value, str):
        raise TypeError(f"a reward is a number, not {value!r}")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"a reward is a finite number, not {reward}")
    return reward
