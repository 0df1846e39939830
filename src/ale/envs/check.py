"""Whether a task is sound: its tests must fail on what the agent starts with and pass on the reference solution."""

from __future__ import annotations

from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.errors import EvaluatorError
from ale.sandbox import SandboxEngine
from ale.task import Task


async def check_task(engine: SandboxEngine, task: Task) -> list[str]:
    """What is wrong with `task`, a sentence each; empty when it is sound. Raises `SandboxError`."""
    problems: list[str] = []
    if not task.solution:
        return ["there is no solution/solve.sh to try"]
    for commands, expected in (((), 0.0), (task.solution, 1.0)):
        done = "its reference solution" if commands else "nothing done"
        try:
            reward = await _play(engine, task, commands)
        except EvaluatorError as error:
            problems.append(f"with {done}: {error}")
        else:
            if reward != expected:
                problems.append(f"with {done} the reward is {reward:g} and should be {expected:g}")
    return problems


async def _play(engine: SandboxEngine, task: Task, commands: tuple[str, ...]) -> float:
    env = TerminalEnv(
        task, engine, lambda task, snapshot: grade(engine, task, snapshot), command_timeout_s=task.agent_timeout_s
    )
    try:
        await env.reset()
        for command in commands:
            await env.step(command)
        return (await env.score()).reward
    finally:
        await env.close()
