"""Demonstrations by an agent that this project did not write: it runs as it is, and a script stands for its model.

The n-th answer of an episode asks for the n-th action of the task's reference solution, the last one says that the work
is done, each in the model's own tokens. The record that the proxy then keeps, prompts of that agent included, is what a
policy is shown in its warm start.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ale.config import RunConfig, WarmStartConfig
from ale.envs.terminal import TerminalEnv
from ale.errors import EvaluatorError, PolicyError
from ale.messages import Demonstration, Generate, Rollout, Sampling, Turn
from ale.proxy.command import CommandAgent, open_command_agent
from ale.proxy.script import lines
from ale.proxy.server import syntax_of
from ale.proxy.speech import ToolSyntax
from ale.proxy.template import ChatTemplate
from ale.task import Task
from ale.wire import Array


@dataclass
class _Part:
    """One episode's script, how far it has been said, and the turn under way."""

    script: Sequence[str]
    said: int = 0
    prompt: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    given: int = 0


class Oracle:
    """A `Policy` that says what it was told to: `oracle.learn("g3/1", ("```bash\\nls\\n```", "done"))`.

    An episode is all of its sessions. A turn that is asked for in pieces, or cut at its token limit, goes on; whoever
    asks beyond the script gets a `PolicyError`.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.version = 0
        self._template = template
        self._parts: dict[str, _Part] = {}

    def learn(self, episode: str, script: Sequence[str]) -> None:
        self._parts[episode] = _Part(script)

    async def generate(self, request: Generate) -> Turn:
        episode = request.session.partition("~")[0]
        part = self._parts[episode]
        prompt = request.prompt_T.numpy().tolist()
        if part.given == len(part.turn) or prompt != part.prompt + part.turn[: part.given]:
            if part.said == len(part.script):
                raise PolicyError(
                    f"the reference solution of {episode} is over after {part.said} turns, but the agent asks for "
                    "one more: warm_start.say_end has to be what ends it"
                )
            text = part.script[part.said]
            part.said += 1
            part.prompt, part.turn, part.given = prompt, [*self._template.outside(text), self._template.end], 0
        tokens = part.turn[part.given : part.given + request.sampling.max_tokens]
        part.given += len(tokens)
        certain = Array.of([0.0] * len(tokens), "float32")
        return Turn(
            tokens_A=Array.of(tokens, "int32"),
            logp_A=certain,
            logp_sampled_A=certain,
            version_A=Array.of([0] * len(tokens), "int32"),
            finish="stop" if part.given == len(part.turn) else "length",
        )

    def forget(self, episode: str) -> None:
        del self._parts[episode]

    async def end_session(self, session: str) -> None:
        """An answer that was given up ends its session, not the episode."""

    async def load_weights(self, version: int, slot: int) -> None:
        self.version = version


class Demonstrator:
    """Plays reference solutions with the run's own program. `syntax` is how the policy will write its calls."""

    def __init__(self, agent: CommandAgent, oracle: Oracle, config: WarmStartConfig, syntax: ToolSyntax) -> None:
        self._agent = agent
        self._oracle = oracle
        self._config = config
        self._syntax = syntax

    async def demonstrate(self, task: Task) -> tuple[Demonstration, ...]:
        """Every branch of the episode. Raises `EvaluatorError` unless its reward is above 0: what does not work is not
        shown."""
        id = f"demonstrations/{task.id}"
        self._oracle.learn(id, lines(task, self._config, self._syntax))
        try:
            shown = await self._agent.play(Rollout(id=id, group="demonstrations", task=task, sampling=Sampling()))
        finally:
            self._oracle.forget(id)
        if shown.status != "scored" or not shown.reward:
            why = f"gets the reward {shown.reward:g}" if shown.reward is not None else f"ends as {shown.status}"
            raise EvaluatorError(
                f"the reference solution of {task.id}, played by agent.command, {why}: {shown.cause or 'see its tests'}"
            )
        return tuple(Demonstration(tokens_T=t.tokens_T, chunks=t.chunks) for t in shown.sequences)


@asynccontextmanager
async def open_demonstrator(
    tokenizer: Any, make_env: Callable[[Task], TerminalEnv], config: RunConfig
) -> AsyncIterator[Demonstrator]:
    """Raises `ModelError` when the chat template of `tokenizer` cannot be used."""
    template = ChatTemplate(tokenizer)
    oracle = Oracle(template)
    async with open_command_agent(oracle, tokenizer, make_env, config) as agent:
        yield Demonstrator(agent, oracle, config.warm_start, syntax_of(template, config.agent.tool_syntax))
