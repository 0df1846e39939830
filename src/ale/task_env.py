"""The other direction: a task of ours as an environment with GEM's API, for other trainers, agents and scripts.

    with ale.make("task:tasks/copy-7") as env:                         # or "task:copy/7": family and seed
        observation, info = env.reset()
        observation, reward, terminated, truncated, info = env.step("```bash\\nls\\n```")

An action is a whole turn, read as in training: a command in a fence, or without one the final answer, which has the
tests run. `ale.make_async` gives the same with `await`; many of those can share one engine of sandboxes. With `url` and
`token` the sandboxes are those of a running service (docs/sandbox-service.md).

Several `agents` share the sandbox of one environment, `env.step(action, agent="coder")`, each with turns of its own;
the tests run when the last of them is done, and that step has the reward of all. Agents apart: environments apart.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ale.agent.actions import Answer, Call, Malformed, parse
from ale.config import AgentConfig
from ale.envs.env import Env
from ale.envs.families import FAMILIES
from ale.envs.families import make as make_task
from ale.envs.grade import grade
from ale.envs.task_dir import load_task
from ale.envs.terminal import TerminalEnv
from ale.envs.wire import AGENT
from ale.errors import ConfigError
from ale.hub import Hub
from ale.sandbox import Kind, SandboxEngine, open_engine
from ale.sandbox.shielded import shielded
from ale.task import Task

if TYPE_CHECKING:
    from ale.envs.remote import RemoteTaskEnv

T = TypeVar("T")
Observed = tuple[str, float, bool, bool, dict[str, Any]]
_PREFIX = "task:"


class AsyncTaskEnv:
    """One task, episode after episode: each `reset()` starts a fresh sandbox. `close()` when done."""

    def __init__(
        self,
        task: Task,
        *,
        limits: AgentConfig,
        sandbox: Kind = "local",
        engine: SandboxEngine | None = None,
        agents: tuple[str, ...] = (AGENT,),
    ) -> None:
        if not agents or len(set(agents)) != len(agents) or not all(agents):
            raise ConfigError(f"agents: expected different names, at least one, got {agents}.")
        self.task, self.agents = task, agents
        self._limits = limits
        self._kind = sandbox
        self._engine = engine
        self._stack = AsyncExitStack()
        self._env: Env | None = None
        self._turns: dict[str, int] = {}  # of the agents that are not done

    async def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """The instruction. A task starts the same way every time: `seed` is there because GEM's callers pass one."""
        await self._end()
        if (engine := self._engine) is None:
            engine = self._engine = await self._stack.enter_async_context(open_engine(self._kind))
        env = self._env = TerminalEnv(
            self.task,
            engine,
            lambda task, snapshot: grade(engine, task, snapshot),
            max_output_chars=self._limits.max_output_chars,
            command_timeout_s=self._limits.command_timeout_s,
        )
        self._turns = dict.fromkeys(self.agents, 0)
        try:
            instruction = await env.reset()
        finally:
            if self._env is not env:  # it was closed, or reset again, before it had a sandbox to close
                await shielded(env.close())
        if self._env is not env:
            raise RuntimeError("the environment was closed, or reset again, while it was reset")
        return instruction, {"task": self.task.id}

    async def step(self, action: str, *, agent: str | None = None) -> Observed:
        """Carries out one turn. The tests run at the final answer or at the last turn allowed; until then the reward
        is 0. Raises `SandboxError` and `EvaluatorError`: neither is a reward of 0."""
        agent = agent or self.agents[0]
        if agent not in self.agents:
            raise ConfigError(f"agent: {self.task.id} is played by {', '.join(self.agents)}, not by {agent!r}.")
        if self._env is None or agent not in self._turns:
            raise RuntimeError("reset() starts an episode; this one is over" + (f" for {agent}" if self._env else ""))
        self._turns[agent] += 1
        truncated = self._turns[agent] >= self._limits.max_turns
        observation, info = "", dict[str, Any]()
        match parse(action, self.task.actions):
            case Answer():
                return await self._finish(agent, observation, terminated=True, info=info)
            case Malformed(reason=reason):
                observation = reason
            case Call(command=command):
                done = await self._env.step(command)
                observation, info = done.observation, {"result": done.result}
        if truncated:
            return await self._finish(agent, observation, terminated=False, info=info)
        return observation, 0.0, False, False, info

    async def close(self) -> None:
        """Ends the episode and, unless it was given, the engine. Idempotent."""
        try:
            await self._end()
        finally:
            await self._stack.aclose()

    async def __aenter__(self) -> AsyncTaskEnv:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _finish(self, agent: str, observation: str, *, terminated: bool, info: dict[str, Any]) -> Observed:
        self._turns.pop(agent, None)
        if self._turns:
            return observation, 0.0, terminated, not terminated, info | {"waiting_for": tuple(self._turns)}
        assert self._env is not None
        try:
            score = await self._env.score()
        finally:
            await self._end()
        return observation, score.reward, terminated, not terminated, info | {"tests": score.output}

    async def _end(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            await env.close()


class TaskEnv:
    """An `AsyncTaskEnv` for code without `await`, in a notebook too: an event loop in a thread carries it."""

    def __init__(self, env: AsyncTaskEnv | RemoteTaskEnv) -> None:
        self.task = env.task
        self._env = env
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"ale {env.task.id}", daemon=True)
        self._thread.start()

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return self._run(self._env.reset(seed))

    def step(self, action: str, *, agent: str | None = None) -> Observed:
        return self._run(self._env.step(action, agent=agent))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        try:
            self._run(self._env.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> TaskEnv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()


def make(
    name: str,
    *,
    limits: AgentConfig | None = None,
    sandbox: Kind = "local",
    agents: tuple[str, ...] = (AGENT,),
    url: str | None = None,
    token: str | None = None,
) -> TaskEnv:
    """The environment `name`: "task:DIRECTORY", "task:FAMILY/SEED" or "task:hub:PACK/TASK".

    `url` and `token`: of the service whose sandboxes are used; it is sent the whole task. Raises `UserError`.
    """
    return TaskEnv(make_async(name, limits=limits, sandbox=sandbox, agents=agents, url=url, token=token))


def make_async(
    name: str,
    *,
    limits: AgentConfig | None = None,
    sandbox: Kind = "local",
    engine: SandboxEngine | None = None,
    agents: tuple[str, ...] = (AGENT,),
    url: str | None = None,
    token: str | None = None,
) -> AsyncTaskEnv | RemoteTaskEnv:
    """`make` for code that awaits. `engine`: its sandboxes are shared and stay open. Raises `UserError`."""
    limits = limits or AgentConfig()
    if (url is None) != (token is None):
        raise ConfigError("make: url and token go together; the state file of `ale sandbox serve` has both.")
    if url is None or token is None:
        return AsyncTaskEnv(_task(name), limits=limits, sandbox=sandbox, engine=engine, agents=agents)
    from ale.envs.remote import RemoteTaskEnv

    if engine is not None:
        raise ConfigError("make: engine and url exclude each other: a service has sandboxes of its own.")
    return RemoteTaskEnv(_task(name), limits, agents, url, token)


def find_task(name: str, hub: Hub | None) -> Task:
    """The task "task:FAMILY/SEED" or "task:hub:PACK/TASK": what anybody may name. Raises `UserError`."""
    which = name.removeprefix(_PREFIX)
    procedural = re.fullmatch(r"([a-z]+)/(\d{1,18})", which, re.ASCII)
    if name.startswith(_PREFIX) and procedural and procedural[1] in FAMILIES:
        return make_task(procedural[1], int(procedural[2]))
    packed = re.fullmatch(r"hub:([\w.-]+)/([A-Za-z0-9][\w.-]*)", which, re.ASCII)
    if name.startswith(_PREFIX) and packed and hub is not None:
        return load_task(hub.tasks(packed[1]) / packed[2])
    raise ConfigError(f'make: an environment is named "task:FAMILY/SEED" or "task:hub:PACK/TASK", not {name!r}.')


def _task(name: str) -> Task:
    if not name.startswith(_PREFIX):
        raise ConfigError(f'make: an environment is named "task:DIRECTORY" or "task:FAMILY/SEED", not {name!r}.')
    try:
        return find_task(name, Hub.default())
    except ConfigError:
        return load_task(name.removeprefix(_PREFIX))
