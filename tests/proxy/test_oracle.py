"""A program is demonstrated by running it: a script stands for its model, and the record is what a policy is shown."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from ale.agent.chat import Chat
from ale.config import AgentConfig, RunConfig, WarmStartConfig
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.errors import EvaluatorError, PolicyError
from ale.messages import Demonstration, Generate, Sampling
from ale.proxy.oracle import Oracle, open_demonstrator
from ale.proxy.script import lines
from ale.proxy.template import ChatTemplate
from ale.sandbox import Mount, SandboxEngine
from ale.task import Task
from ale.wire import Array

from .test_command import LIMITS, PLAIN, TASK

SOLVED = msgspec.structs.replace(TASK, solution=("cat a.txt", "echo yes > a.txt"))


@pytest.fixture
def demonstrate(loop: asyncio.Runner, sandboxes: SandboxEngine, nano_tokenizer: Any, tmp_path: Any) -> Any:
    (tmp_path / "agent.py").write_text(PLAIN)

    def environment(task: Task) -> TerminalEnv:
        mounts = (Mount(str(tmp_path), "/agent"),)
        return TerminalEnv(task, sandboxes, lambda task, snapshot: grade(sandboxes, task, snapshot), mounts=mounts)

    def show(task: Task, limits: AgentConfig = LIMITS, **warm_start: Any) -> tuple[Demonstration, ...]:
        config = RunConfig(agent=limits, warm_start=WarmStartConfig(**warm_start))

        async def scenario() -> tuple[Demonstration, ...]:
            async with open_demonstrator(nano_tokenizer, environment, config) as demonstrator:
                return await demonstrator.demonstrate(task)

        return loop.run(scenario())

    return show


def test_a_demonstration_is_the_programs_own_episode_with_the_solution_in_it(
    demonstrate: Any, nano_tokenizer: Any
) -> None:
    chat = Chat(nano_tokenizer)
    (shown,) = demonstrate(SOLVED)
    said = [chat.spoken(line) for line in ("```bash\ncat a.txt\n```", "```bash\necho yes > a.txt\n```", "done")]
    tokens = shown.tokens_T.numpy().tolist()
    assert [tokens[c.start : c.end] for c in shown.chunks] == said
    assert tokens[: shown.chunks[0].start] == chat.start(TASK.instruction)
    assert [c.ending for c in shown.chunks] == ["answer"] * 3  # this program names no tools


@pytest.mark.parametrize(
    ("solution", "warm_start", "said"),
    [
        (("echo no > a.txt",), {}, "gets the reward 0"),
        (("echo yes > a.txt",), {"say_end": ""}, "say_end has to be what ends it"),
    ],
    ids=["a wrong solution", "no end"],
)
def test_what_does_not_work_is_not_shown(
    demonstrate: Any, solution: tuple[str, ...], warm_start: dict[str, Any], said: str
) -> None:
    with pytest.raises(EvaluatorError, match=said):
        demonstrate(msgspec.structs.replace(TASK, solution=solution), **warm_start)


@pytest.mark.parametrize(
    ("config", "syntax", "first", "last"),
    [
        ({}, "fence", '```bash\necho "a"\n```', "done"),
        ({}, "tags", '<tool_call>\n{"name": "bash", "arguments": {"command": "echo \\"a\\""}}\n</tool_call>', "done"),
        ({"say_action": "do {action} as {json}", "say_end": "end"}, "tags", 'do echo "a" as "echo \\"a\\""', "end"),
    ],
    ids=["fence", "tags", "own words"],
)
def test_how_an_action_is_said(config: dict[str, Any], syntax: Any, first: str, last: str) -> None:
    task = msgspec.structs.replace(TASK, solution=('echo "a"',))
    assert lines(task, WarmStartConfig(**config), syntax) == (first, last)
    literal = msgspec.structs.replace(TASK, solution=("echo {json}",))
    assert "echo {json}" in lines(literal, WarmStartConfig(), "fence")[0]


def test_a_turn_that_is_asked_for_in_pieces_goes_on_and_an_agent_that_asks_on_is_told(nano_tokenizer: Any) -> None:
    chat, oracle = Chat(nano_tokenizer), Oracle(ChatTemplate(nano_tokenizer))
    oracle.learn("g/0", ("cp oak.txt fox.txt",))
    whole = chat.spoken("cp oak.txt fox.txt")

    async def ask(prompt: list[int], most: int) -> list[int]:
        request = Generate(session="g/0~1", prompt_T=Array.of(prompt, "int32"), sampling=Sampling(max_tokens=most))
        return (await oracle.generate(request)).tokens_A.numpy().tolist()

    async def scenario() -> None:
        said: list[int] = []
        while len(said) < len(whole):
            await oracle.end_session("g/0~1")  # as when a client hangs up and asks again
            piece = await ask([5, 6, *said], 2)
            assert 0 < len(piece) <= 2
            said += piece
        assert said == whole
        with pytest.raises(PolicyError, match="over after 1 turns"):
            await ask([5, 6, *said, 7], 9)
        oracle.forget("g/0")

    asyncio.run(scenario())
