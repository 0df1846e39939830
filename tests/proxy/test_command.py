"""An agent that this project did not write, in a sandbox without a network, through the proxy, to a score."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ale.agent.actions import render
from ale.agent.chat import Chat
from ale.config import AgentConfig, RunConfig
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.errors import PolicyError
from ale.messages import Rollout, Sampling, Trajectory
from ale.proxy.command import open_command_agent
from ale.sandbox import AlarmRules, Mount, SandboxEngine
from ale.task import REWARD_FILE, Task, TaskFile
from ale.testing.scripted_policy import ScriptedPolicy

from .packages import copy_packages

ROOT = Path(__file__).resolve().parent.parent.parent
TEST = f'[ "$(cat a.txt)" = yes ] && r=1 || r=0; echo $r > {REWARD_FILE}'.encode()
TASK = Task(id="t-1", instruction="Write yes to a.txt.", files=(), tests=(TaskFile("test.sh", TEST),), memory_mb=512)
LIMITS = AgentConfig(
    kind="command",
    command="/usr/bin/python3 /agent/agent.py",
    max_turn_tokens=200,
    max_context_tokens=4000,
    env={"PYTHONPATH": "/packages"},
    episode_timeout_s=200,
)
# Without any package: HTTP by hand, as a program in another language would.
PLAIN = """
import json, os, subprocess, urllib.request
messages = [{"role": "user", "content": os.environ["ALE_INSTRUCTION"]}]
for _ in range(9):
    body = json.dumps({"model": "m", "messages": messages}).encode()
    head = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, head)
    said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]
    if "```bash" not in said["content"]:
        break
    command = said["content"].split("```bash\\n")[1].split("\\n```")[0]
    seen = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    messages += [said, {"role": "user", "content": seen or "ok"}]
"""


@pytest.fixture
def chat(nano_tokenizer: Any) -> Chat:
    return Chat(nano_tokenizer)


def play(
    loop: asyncio.Runner,
    sandboxes: SandboxEngine,
    tokenizer: Any,
    policy: Any,
    limits: AgentConfig,
    mounts: tuple[Mount, ...],
    alarms: AlarmRules | None = None,
) -> Trajectory:
    def environment(task: Task) -> TerminalEnv:
        return TerminalEnv(
            task,
            sandboxes,
            lambda task, snapshot: grade(sandboxes, task, snapshot),
            mounts=mounts,
            pids=64,
            alarms=alarms,
        )

    async def scenario() -> Trajectory:
        async with open_command_agent(policy, tokenizer, environment, RunConfig(agent=limits)) as agent:
            rollout = Rollout(id="g/0", group="g", task=TASK, sampling=Sampling(seed=10, temperature=0.5))
            return await agent.play(rollout)

    return loop.run(scenario())


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Mount, ...]:
    (tmp_path / "agent.py").write_text(PLAIN)
    return (Mount(str(tmp_path), "/agent"),)


def test_a_program_in_the_sandbox_is_recorded_token_for_token_and_scored(
    loop: asyncio.Runner, sandboxes: SandboxEngine, nano_tokenizer: Any, chat: Chat, plain: tuple[Mount, ...]
) -> None:
    policy = ScriptedPolicy(chat, render("ls"), render("echo yes > a.txt"), "done", version=3)
    t = play(loop, sandboxes, nano_tokenizer, policy, LIMITS, plain)
    assert (t.status, t.cause, t.reward, t.answer) == ("scored", None, 1.0, "done")
    assert (t.branches, [c.ending for c in t.chunks]) == ((), ["answer"] * 3)
    tokens = t.tokens_T.numpy().tolist()
    for chunk, turn, request in zip(t.chunks, policy.turns, policy.requests, strict=True):
        assert tokens[chunk.start : chunk.end] == turn.tokens_A.numpy().tolist()
        assert request.prompt_T.numpy().tolist() == tokens[: chunk.start]
        assert (request.sampling.temperature, request.session) == (0.5, "g/0")
    assert (t.started_version, t.version_A.numpy().min()) == (3, 3)
    assert policy.ended == ["g/0"]


@pytest.mark.parametrize(
    ("script", "limits", "status", "cause"),
    [
        (["done"], {"command": "exit 3"}, "agent_failure", "asked the model nothing; it ended with exit code 3"),
        ([PolicyError("no memory")], {}, "policy_failure", "no memory"),
        ([render("ls")] * 9, {"max_turns": 2}, "scored", None),
        (["done"], {"command": "sleep 100", "episode_timeout_s": 1.5}, "episode_timeout", "longer than 1.5 s"),
    ],
    ids=["asks nothing", "engine fails", "budget", "time"],
)
def test_how_an_episode_can_end(
    loop: asyncio.Runner,
    sandboxes: SandboxEngine,
    nano_tokenizer: Any,
    chat: Chat,
    plain: tuple[Mount, ...],
    script: list[Any],
    limits: dict[str, Any],
    status: str,
    cause: str | None,
) -> None:
    policy = ScriptedPolicy(chat, *script)
    t = play(loop, sandboxes, nano_tokenizer, policy, msgspec.structs.replace(LIMITS, **limits), plain)
    assert t.status == status, t.cause
    assert cause is None or cause in str(t.cause)
    assert t.reward == (0.0 if status == "scored" else None)


def test_what_an_alarm_stops_is_no_failure_of_the_sandbox(
    loop: asyncio.Runner, sandboxes: SandboxEngine, nano_tokenizer: Any, chat: Chat, plain: tuple[Mount, ...]
) -> None:
    policy, limits = ScriptedPolicy(chat, "done"), msgspec.structs.replace(LIMITS, command="xmrig -o pool:3333; exit 0")
    t = play(loop, sandboxes, nano_tokenizer, policy, limits, plain, AlarmRules(miner="stop"))
    assert (t.status, t.reward) == ("stopped_by_alarm", None)
    assert "miner" in str(t.cause)
    (result,) = t.results
    assert [(a.rule, a.action) for a in result.alarms] == [("miner", "stop")]


@pytest.mark.skipif(
    not Path(f"/usr/bin/python3.{sys.version_info.minor}").exists(),
    reason="the sandbox's own Python is of another version than the packages",
)
def test_the_bare_openai_client_completes_a_task(
    loop: asyncio.Runner, sandboxes: SandboxEngine, nano_tokenizer: Any, chat: Chat, tmp_path: Path
) -> None:
    packages = copy_packages("openai", tmp_path / "packages")
    mounts = (Mount(str(ROOT / "examples" / "openai_client"), "/agent"), Mount(str(packages), "/packages"))
    policy = ScriptedPolicy(chat, render("ls"), render("echo yes > a.txt"), "done")
    t = play(loop, sandboxes, nano_tokenizer, policy, LIMITS, mounts)
    assert (t.status, t.cause, t.reward) == ("scored", None, 1.0)
    assert [c.ending for c in t.chunks] == ["call", "call", "answer"]
    said = [policy.turns[i].tokens_A.numpy().tolist() for i in range(3)]
    after = [chat.observation("ok", ended=True)] * 2
    assert t.tokens_T.numpy().tolist() == [
        *chat.start(TASK.instruction),
        *said[0],
        *after[0],
        *said[1],
        *after[1],
        *said[2],
    ]
