"""The agent loop: one episode from its instruction to its score, with everything that was sampled on record.

    instruction -> [ policy turn -> parse -> environment step -> observation ] ... -> answer or limit -> score

A chunk is one policy turn: it ends with a call, a malformed call, the final answer, or is cut at its token limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ale.agent.actions import Answer, Call, Malformed, parse, render
from ale.agent.chat import Chat
from ale.agent.failure import FAILURES, failure_of
from ale.audit import Alarm
from ale.config import AgentConfig
from ale.envs.env import Env
from ale.errors import DeadlineExceeded, EvaluatorError, PolicyError, SandboxError, WorkerDied
from ale.messages import (
    Chunk,
    Demonstration,
    Ending,
    Generate,
    Rollout,
    Score,
    Status,
    ToolResult,
    Trajectory,
    Turn,
)
from ale.policy.port import Policy
from ale.task import Task
from ale.wire import Array

logger = logging.getLogger(__name__)

Judge = Callable[[Trajectory], Awaitable[float]]
"""Scores a finished episode in place of its environment. Raises `EvaluatorError`."""

_ENDINGS: dict[type, Ending] = {Answer: "answer", Call: "call", Malformed: "malformed"}
_CUT = "error: the turn was cut at its token limit"


@dataclass
class _Record:
    """What has happened so far."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    logp: list[Array] = field(default_factory=list)
    logp_sampled: list[Array] = field(default_factory=list)
    version: list[Array] = field(default_factory=list)
    experts: Array | None = None
    results: list[ToolResult] = field(default_factory=list)
    answer: str | None = None
    illegal: int = 0

    def alarms(self) -> Iterator[Alarm]:
        return (alarm for result in self.results for alarm in result.alarms)

    def add(self, turn: Turn, ending: Answer | Call | Malformed) -> None:
        start = len(self.tokens)
        self.tokens += turn.tokens_A.numpy().tolist()
        kind: Ending = "cut" if turn.finish == "length" else _ENDINGS[type(ending)]
        self.chunks.append(Chunk(start, len(self.tokens), kind, error=kind in ("malformed", "cut")))
        self.logp.append(turn.logp_A)
        self.logp_sampled.append(turn.logp_sampled_A)
        self.version.append(turn.version_A)
        self.experts = turn.experts_TLJ


async def run_episode(
    rollout: Rollout,
    policy: Policy,
    make_env: Callable[[Task], Env],
    chat: Chat,
    limits: AgentConfig,
    judge: Judge | None = None,
) -> Trajectory:
    """Runs one episode. A failure of sandbox, policy or tests is a status of the trajectory, not an exception."""
    began, version = time.monotonic(), policy.version
    record = _Record()
    reward: float | None = None
    status: Status = "scored"
    cause: str | None = None

    def trajectory() -> Trajectory:
        return Trajectory(
            id=rollout.id,
            group=rollout.group,
            task=rollout.task.id,
            family=rollout.task.family,
            level=rollout.task.level,
            tokens_T=Array.of(record.tokens, "int32"),
            chunks=tuple(record.chunks),
            logp_A=_join(record.logp, "float32"),
            logp_sampled_A=_join(record.logp_sampled, "float32"),
            version_A=_join(record.version, "int32"),
            experts_TLJ=record.experts,
            results=tuple(record.results),
            answer=record.answer,
            reward=reward,
            status=status,
            cause=cause,
            started_version=version,
            duration_s=time.monotonic() - began,
        )

    env = make_env(rollout.task)
    allowed_s = limits.episode_timeout_s
    straggler = rollout.straggler_s is not None and rollout.straggler_s < allowed_s
    if rollout.straggler_s is not None and straggler:
        allowed_s = rollout.straggler_s
    try:
        async with asyncio.timeout(allowed_s) as scope:
            await _converse(rollout, policy, env, chat, limits, record)
            if record.illegal > limits.max_illegal_calls:
                status, cause = "illegal_tool_calls", f"{record.illegal} malformed calls"
            elif (alarm := next((alarm for alarm in record.alarms() if alarm.action == "stop"), None)) is not None:
                status, cause = "stopped_by_alarm", f"{alarm.rule}: {alarm.evidence}"
            else:
                reward = (await env.score()).reward if judge is None else await judge(trajectory())
    except FAILURES as error:
        status, cause = failure_of(error, allowed_s)
        if status == "episode_timeout" and straggler and scope.expired():
            status = "straggler"
    finally:
        try:
            await env.close()
        except (SandboxError, DeadlineExceeded) as error:  # it is over; a cancellation must stay one
            logger.warning("the environment of %s did not close: %s", rollout.id, error)
    return trajectory()


async def _converse(
    rollout: Rollout, policy: Policy, env: Env, chat: Chat, limits: AgentConfig, record: _Record
) -> None:
    record.tokens += chat.start(await env.reset(), limits.system_prompt)
    try:
        for number in range(limits.max_turns):
            room = limits.max_context_tokens - len(record.tokens)
            if room < 1:
                return
            sampling = msgspec.structs.replace(
                rollout.sampling,
                max_tokens=min(limits.max_turn_tokens, room),
                stop=(chat.end,),
                seed=rollout.sampling.seed + number,
            )
            prompt_T = Array.of(record.tokens, "int32")
            turn = await policy.generate(Generate(session=rollout.id, prompt_T=prompt_T, sampling=sampling))
            action = parse(chat.text(turn.tokens_A.numpy().tolist()), rollout.task.actions)
            record.add(turn, action)
            if turn.finish == "length":
                action = Malformed(_CUT)
            match action:
                case Answer(text=text):
                    record.answer = text
                    return
                case Malformed(reason=reason):
                    record.illegal += 1
                    observation = reason
                    if record.illegal > limits.max_illegal_calls:
                        return
                case Call(command=command):
                    step = await env.step(command)
                    observation = step.observation
                    if step.result is not None:
                        record.results.append(step.result)
                        if step.result.exit_code != 0:
                            record.chunks[-1] = msgspec.structs.replace(record.chunks[-1], error=True)
                    if step.terminated:
                        return
            record.tokens += chat.observation(observation, ended=turn.finish == "stop")
    finally:
        try:
            await policy.end_session(rollout.id)
        except (PolicyError, WorkerDied, DeadlineExceeded) as error:
            logger.warning("the policy did not forget %s: %s", rollout.id, error)


async def demonstrate(
    task: Task, make_env: Callable[[Task], Env], chat: Chat, limits: AgentConfig, judge: Judge | None = None
) -> Demonstration:
    """The reference solution carried out for real and written down as an episode. Raises `EvaluatorError` unless
    its reward is then above 0: what does not work is not shown."""
    env = make_env(task)
    record = _Record()

    def say(text: str, ending: Ending) -> None:
        spoken = chat.spoken(text)
        record.chunks.append(Chunk(len(record.tokens), len(record.tokens) + len(spoken), ending))
        record.tokens += spoken

    try:
        record.tokens += chat.start(await env.reset(), limits.system_prompt)
        for action in task.solution:
            say(render(action, task.actions), "call")
            step = await env.step(action)
            if step.result is not None:
                record.results.append(step.result)
            if step.terminated:
                break
            record.tokens += chat.observation(step.observation, ended=True)
        else:
            if task.actions == "bash":
                record.answer = "done"
                say(record.answer, "answer")
        tokens_T, chunks = Array.of(record.tokens, "int32"), tuple(record.chunks)
        if judge is None:
            score = await env.score()
        else:
            certain = Array.of(np.zeros(sum(c.end - c.start for c in chunks)), "float32")
            shown = Trajectory(
                id=f"demonstrations/{task.id}",
                group="demonstrations",
                task=task.id,
                family=task.family,
                level=task.level,
                tokens_T=tokens_T,
                chunks=chunks,
                logp_A=certain,
                logp_sampled_A=certain,
                version_A=Array.of(certain.numpy(), "int32"),
                results=tuple(record.results),
                answer=record.answer,
            )
            score = Score(reward=await judge(shown))
    finally:
        await env.close()
    if score.reward <= 0:
        raise EvaluatorError(f"the reference solution of {task.id} gets the reward {score.reward:g}: {score.output}")
    return Demonstration(tokens_T=tokens_T, chunks=chunks)


def _join(parts: list[Array], dtype: str) -> Array:
    return Array.of(np.concatenate([p.numpy() for p in parts]) if parts else [], dtype)
