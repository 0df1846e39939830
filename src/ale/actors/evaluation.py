"""Evaluation: every task once, at the evaluation's own temperature, and the share that was solved with its interval."""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Callable, Sequence

from ale.actors.env_manager import rollout_deadline_s
from ale.bus import Bus
from ale.config import EvalConfig, RunConfig
from ale.errors import first_error
from ale.messages import Rollout, Sampling, Trajectory
from ale.progress import Rate
from ale.task import Task

# An episode whose sandbox or tests failed says nothing about the policy: it is run again, this often.
_ATTEMPTS = 3
# 0.975 quantile of the normal distribution.
_Z95 = 1.959963984540054


async def evaluate_tasks(
    bus: Bus,
    config: RunConfig,
    tasks: Sequence[Task],
    name: str,
    done: Callable[[int], None] = lambda n: None,
    *,
    at_once: int | None = None,
) -> list[Trajectory]:
    """One trajectory for each task, in their order. `done` hears how many have finished. `at_once` bounds how many are
    asked for: beside training, the rest of the environment manager's places are left to it.

    A task whose infrastructure fails every time stays in the result, without a reward: it counts as not solved.
    """
    finished = 0

    async def one(task: Task) -> Trajectory:
        nonlocal finished
        sampling = Sampling(temperature=config.eval.temperature, seed=zlib.crc32(task.id.encode()) << 8)
        for attempt in range(_ATTEMPTS):
            rollout = Rollout(id=f"{name}/{task.id}/{attempt}", group=name, task=task, sampling=sampling)
            trajectory = await bus.ask("envs", rollout, deadline_s=rollout_deadline_s(config))
            if trajectory.status not in ("sandbox_failure", "policy_failure", "evaluator_error"):
                break
        finished += 1
        done(finished)
        return trajectory

    # The environment manager bounds how many run; this bounds how many wait in its inbox.
    room = asyncio.Semaphore(at_once or 2 * config.rollout.concurrency)

    async def bounded(task: Task) -> Trajectory:
        async with room:
            return await one(task)

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(bounded(task), name=f"evaluate {task.id}") for task in tasks]
    except ExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
    return [task.result() for task in running]


def rate(trajectories: Sequence[Trajectory], config: EvalConfig) -> Rate:
    """The share that was solved and its 95% interval (Wilson's score interval, JASA 1927)."""
    n = len(trajectories)
    share = sum(config.solved(t.reward) for t in trajectories) / n
    centre = (share + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * math.sqrt(share * (1 - share) / n + (_Z95 / (2 * n)) ** 2)
    return Rate(success=share, ci95=(max(0.0, centre - half), min(1.0, centre + half)), n=n)
