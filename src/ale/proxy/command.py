"""Agent native mode: an episode is whatever a program does, started by a command in the task's sandbox.

    instruction -> sandbox -> [ program <-> proxy <-> policy ] ... -> the program ends -> tests score what it left

The program is told where its model is by the variables that the official clients read themselves (OPENAI_BASE_URL,
OPENAI_API_KEY, ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY); the task stands in ALE_INSTRUCTION. It needs no network: the
proxy's unix socket is a port on the sandbox's own 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from ale.agent.failure import FAILURES, failure_of
from ale.config import AgentConfig, RunConfig
from ale.envs.terminal import TerminalEnv
from ale.errors import DeadlineExceeded, SandboxError
from ale.messages import Rollout, Status, ToolResult, Trajectory
from ale.policy.port import Policy
from ale.proxy.episode import Episode, Limits
from ale.proxy.sequences import trajectory
from ale.proxy.server import Proxy, open_proxy, train_mode
from ale.sandbox import Command, Completed, Sandbox
from ale.task import Task

logger = logging.getLogger(__name__)

PORT = 8611
"""Of the proxy, inside every sandbox."""
_GRACE_S = 5.0  # for a program to end by itself when its episode is over
_LAST_WORDS = 2000


class CommandAgent:
    """Plays episodes with one command, through one proxy. Where it has a port of the host, `url` is used as it is."""

    def __init__(
        self,
        proxy: Proxy,
        policy: Policy,
        make_env: Callable[[Task], TerminalEnv],
        limits: AgentConfig,
        *,
        journals: Path | None = None,
    ) -> None:
        self._proxy = proxy
        self._policy = policy
        self._make_env = make_env
        self._limits = limits
        self._journals = journals

    async def play(self, rollout: Rollout) -> Trajectory:
        """Runs one episode. A failure of sandbox, policy, program or tests is a status, not an exception."""
        began, version = time.monotonic(), self._policy.version
        c = self._limits
        reward: float | None = None
        status: Status = "scored"
        cause: str | None = None
        ended: Completed | None = None
        result: ToolResult | None = None
        env = self._make_env(rollout.task)
        allowed_s = c.episode_timeout_s
        straggler = rollout.straggler_s is not None and rollout.straggler_s < allowed_s
        if rollout.straggler_s is not None and straggler:
            allowed_s = rollout.straggler_s
        opened = self._proxy.episode(
            rollout.id,
            limits=Limits(
                max_requests=c.max_turns,
                max_turn_tokens=c.max_turn_tokens,
                max_context_tokens=c.max_context_tokens,
                time_s=c.episode_timeout_s,
            ),
            sampling=rollout.sampling,
            pinned=True,
            journal=None if self._journals is None else self._journals / f"{rollout.id.replace('/', '-')}.jsonl",
        )
        async with opened as episode:
            try:
                async with asyncio.timeout(allowed_s) as scope:
                    instruction = await env.reset()
                    try:
                        ended = await self._run(env.sandbox, episode, instruction)
                    finally:
                        result = _result(c.command, env.sandbox, ended)
                    alarm = next((alarm for alarm in result.alarms if alarm.action == "stop"), None)
                    if alarm is not None:
                        status, cause = "stopped_by_alarm", f"{alarm.rule}: {alarm.evidence}"
                    elif not episode.usage.requests:
                        status, cause = "agent_failure", f"it asked the model nothing; it ended with {_words(ended)}"
                    elif episode.failed is not None:
                        status, cause = "policy_failure", episode.failed
                    else:
                        reward = (await env.score()).reward
            except FAILURES as error:
                status, cause = failure_of(error, allowed_s)
                if status == "episode_timeout" and straggler and scope.expired():
                    status = "straggler"
            finally:
                try:
                    await env.close()
                except (SandboxError, DeadlineExceeded) as error:  # it is over; a cancellation must stay one
                    logger.warning("the environment of %s did not close: %s", rollout.id, error)
        assert episode.tree is not None
        played = trajectory(
            episode.tree,
            rollout,
            reward=reward,
            status=status,
            cause=cause,
            started_version=version,
            duration_s=time.monotonic() - began,
        )
        return played if result is None else msgspec.structs.replace(played, results=(result,))

    async def _run(self, sandbox: Sandbox, episode: Episode, instruction: str) -> Completed | None:
        """Until the program ends, or shortly after the episode is over; None when it had to be ended."""
        async with AsyncExitStack() as stack:
            base = self._proxy.url
            if self._proxy.socket is not None:
                await stack.enter_async_context(sandbox.expose(self._proxy.socket, PORT))
                base = f"http://127.0.0.1:{PORT}"
            assert base is not None
            command = Command(
                shell=self._limits.command,
                env={
                    "OPENAI_BASE_URL": f"{base}/v1",
                    "OPENAI_API_KEY": episode.key,
                    "ANTHROPIC_BASE_URL": base,
                    "ANTHROPIC_API_KEY": episode.key,
                    "ALE_INSTRUCTION": instruction,
                    **self._limits.env,
                },
                timeout_s=self._limits.episode_timeout_s,
            )
            running = asyncio.create_task(sandbox.exec(command), name=f"the agent of {episode.id}")
            over = asyncio.create_task(episode.over.wait(), name=f"the end of {episode.id}")
            try:
                await asyncio.wait({running, over}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait({running}, timeout=_GRACE_S)
                return running.result() if running.done() else None
            finally:
                running.cancel()
                over.cancel()
                await asyncio.gather(running, over, return_exceptions=True)


def _result(command: str, sandbox: Sandbox, ended: Completed | None) -> ToolResult:
    """The program itself as one call of the episode's, with all that it tried to reach and what was made of it."""
    return ToolResult(
        call=command,
        output=_words(ended),
        exit_code=None if ended is None else ended.exit_code,
        timed_out=False if ended is None else ended.timed_out,
        duration_s=0.0 if ended is None else ended.duration_s,
        audit=tuple(sandbox.audit()),
        alarms=tuple(sandbox.alarms()),
    )


def _words(ended: Completed | None) -> str:
    if ended is None:
        return "its episode"
    said = ended.text("stderr").strip() or ended.text().strip() or "no output"
    return f"exit code {ended.exit_code}: {said[-_LAST_WORDS:]}"


@asynccontextmanager
async def open_command_agent(
    policy: Policy, tokenizer: Any, make_env: Callable[[Task], TerminalEnv], config: RunConfig
) -> AsyncIterator[CommandAgent]:
    """The proxy of a run, and what plays its episodes. Raises `ModelError` when its chat template cannot be used."""
    agent = config.agent
    mode = train_mode(
        policy,
        tokenizer,
        places=config.rollout.concurrency,
        tool_syntax=agent.tool_syntax,
    )
    alone = config.sandbox.kind == "local"  # such a sandbox has no way to a port of the host
    with tempfile.TemporaryDirectory(prefix="ale-proxy-") as folder:
        listen: dict[str, Any] = {"socket": Path(folder) / "proxy.sock"} if alone else {"port": 0}
        async with open_proxy(mode, **listen) as proxy:
            yield CommandAgent(proxy, policy, make_env, agent)
