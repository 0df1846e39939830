"""When the warm start looks, and what it demonstrates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ale.config import RunConfig, WarmStartConfig
from ale.data.task_stream import TaskStream
from ale.errors import EvaluatorError
from ale.progress import Rate
from ale.task import Task
from ale.warm_start import Checks, _demonstrations


def looks(success_at: dict[int, float], checks: Checks, begin: int = 1) -> list[int]:
    taken = []
    for step in range(begin, 201):
        if checks.due(step):
            taken.append(step)
            if checks.reached(step, success_at.get(step, 0.0)):
                break
    return taken


def test_far_from_the_goal_it_looks_rarely_and_halfway_there_often() -> None:
    rising = {80: 0.1, 120: 0.18, 130: 0.2, 140: 0.34, 150: 0.35}
    assert looks(rising, Checks(0.35, {})) == [40, 80, 120, 130, 140, 150]


def test_a_policy_that_falls_back_is_looked_at_rarely_again() -> None:
    assert looks({40: 0.2, 50: 0.1, 90: 0.3, 100: 0.4}, Checks(0.35, {})) == [40, 50, 90, 100]


def test_without_a_goal_it_never_looks() -> None:
    assert looks({}, Checks(0.0, {})) == []


def test_a_resumed_warm_start_looks_at_the_same_steps() -> None:
    rising = {80: 0.1, 120: 0.18, 130: 0.2, 140: 0.34, 150: 0.35}
    rates = {f"{Checks.name(step)}@0": Rate(success=rising.get(step, 0.0), ci95=(0, 1), n=64) for step in (40, 80, 120)}
    rates["heldout_before@0"] = Rate(success=1.0, ci95=(0, 1), n=200)
    resumed = Checks.of(0.35, rates)
    assert resumed.due(120), "the step of the last look is passed again"
    assert looks(rising, resumed, begin=121) == [130, 140, 150]


def test_a_solution_that_cannot_be_shown_ends_the_run_with_that_reason() -> None:
    async def fail(task: Task) -> Any:
        raise EvaluatorError(f"the reference solution of {task.id} gets the reward 0")

    @asynccontextmanager
    async def demonstrator() -> AsyncIterator[Any]:
        yield fail

    config = RunConfig(warm_start=WarmStartConfig(steps=1, demonstrations=2))
    run = cast("Any", SimpleNamespace(config=config, demonstrator=demonstrator))
    tasks = TaskStream(iter([Task(id=name, solution=("ls",)) for name in "ab"]))
    with pytest.raises(EvaluatorError, match="solution of a gets the reward 0"):
        asyncio.run(_demonstrations(run, tasks, lambda progress: None))
