"""Scheduling for real: what an ended episode holds is free at once, and a run with every setting keeps its promises."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ale.actors.env_manager import EnvManager
from ale.actors.episodes import Episodes, HeardPolicy
from ale.agent.actions import render
from ale.agent.chat import Chat
from ale.bus import Bus
from ale.config import AgentConfig
from ale.config_file import load
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.messages import OpenEngine, Rollout, Sampling
from ale.policy.embedded import open_embedded
from ale.sandbox import SandboxEngine, open_engine
from ale.supervisor import Supervisor
from ale.task import Task, TaskFile
from ale.testing.scripted_policy import ScriptedPolicy

SMALL = """
[model]
path = "{model}"
pool = 2
[tasks]
heldout = 2
families = 0
selection = "moderate"
[warm_start]
steps = 2
demonstrations = 2
batch = 2
[agent]
max_turns = 2
max_turn_tokens = 12
max_context_tokens = 400
[rollout]
group_size = 2
groups_per_step = 2
concurrency = 8
adaptive = true
engine_rows = 4
versions = "turn"
turn_drain_s = 0.02
extra_members = 1
extra_groups = 1
straggler_factor = 20
[algorithm]
baseline = "signed"
[learner]
updates = 6
checkpoint_every = 2
[eval]
every = 2
beside = true
"""

LONG = AgentConfig(
    max_turn_tokens=1500, max_context_tokens=1900, max_turns=3, command_timeout_s=100, tool_syntax="fence"
)
TASK = Task(id="t-1", instruction="Wait.", tests=(TaskFile("test.sh", b"sleep 100"),), verifier_timeout_s=100)


async def until(holds: Callable[[], Any], *, deadline_s: float = 20.0) -> float:
    """Seconds until it held."""
    began = time.monotonic()
    async with asyncio.timeout(deadline_s):
        while not holds():
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def ended_in(policy: Any, chat: Chat, engine: SandboxEngine, busy: Callable[[], Any]) -> float:
    """Seconds from the cancellation of an episode that is `busy` until its place and its sandboxes are free."""
    episodes, bus = Episodes(1), Bus()
    async with Supervisor(bus) as supervisor:
        manager = EnvManager(
            HeardPolicy(policy, episodes),
            lambda task: TerminalEnv(task, engine, lambda t, snapshot: grade(engine, t, snapshot)),
            chat,
            LONG,
            episodes,
            concurrency=1,
        )
        await supervisor.start(manager)
        rollout = Rollout(id="g1/0", group="g1", task=TASK, sampling=Sampling())
        asking = asyncio.create_task(bus.ask("envs", rollout, deadline_s=300))
        await until(busy, deadline_s=60)
        assert (episodes.running, asking.done()) == (1, False)
        asking.cancel()
        return await until(lambda: episodes.running == 0 and engine.statistics().alive == 0)


def test_an_ended_episode_frees_its_sandbox_in_the_middle_of_a_command(nano_tokenizer: Any) -> None:
    async def scenario() -> None:
        chat = Chat(nano_tokenizer)
        policy = ScriptedPolicy(chat, render("sleep 100"))
        async with open_engine("local") as engine:
            took = await ended_in(policy, chat, engine, lambda: policy.requests and engine.statistics().alive)
            assert took < 5
            assert list(engine.scratch.iterdir()) == []

    asyncio.run(scenario())


def test_an_ended_episode_frees_the_sandbox_of_its_tests(nano_tokenizer: Any) -> None:
    async def scenario() -> None:
        chat = Chat(nano_tokenizer)
        policy = ScriptedPolicy(chat, "done")
        async with open_engine("local") as engine:
            took = await ended_in(policy, chat, engine, lambda: policy.requests and any(engine.scratch.glob("grade-*")))
            assert took < 5
            assert list(engine.scratch.iterdir()) == []

    asyncio.run(scenario())


def test_an_ended_episode_frees_its_row_in_the_engine(nano_path: Path, nano_tokenizer: Any) -> None:
    async def scenario() -> None:
        chat = Chat(nano_tokenizer)
        settings = OpenEngine(model=str(nano_path), weights_fd=None, slots=1, threads=1, rows=1)
        async with open_engine("local") as engine, open_embedded(settings) as policy:
            seen = await policy.statistics()

            async def look() -> None:
                nonlocal seen
                while True:
                    seen = await policy.statistics()

            looking = asyncio.create_task(look())
            assert await ended_in(policy, chat, engine, lambda: seen.running) < 5
            looking.cancel()
            after = await policy.statistics()
            assert (after.running, after.waiting, after.parked) == (0, 0, 0)

    asyncio.run(scenario())


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_run_with_every_setting_keeps_versions_per_turn_books_and_evaluations(
    tmp_path: Path, nano_path: Path
) -> None:
    from ale.pipeline import train

    (tmp_path / "a.toml").write_text(SMALL.format(model=nano_path))
    summary = asyncio.run(train(load(tmp_path / "a.toml", [f"runs_dir={tmp_path}"])))
    assert (summary.updates, summary.lost_samples) == (6, 0)
    assert summary.max_lag_seen <= 1
    assert summary.dropped_by_reason["redundant"] >= 6
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["evaluation"]: line for line in lines if "evaluation" in line}
    assert list(evaluations) == ["heldout_before", "heldout_2", "heldout_4", "heldout_6", "heldout_after"]
    first, last = evaluations["heldout_before"]["versions"], evaluations["heldout_after"]["versions"]
    assert first[0] == first[1]
    assert last[0] == last[1] == first[0] + 6
    for line in lines:
        if "update" in line:
            assert 1 <= line["episodes_allowed"] <= 8
    trained = [json.loads(line) for line in (tmp_path / "a" / "trajectories.jsonl").read_text().splitlines()]
    assert trained
    for t in trained:
        at = 0
        for start, end, *_ in t["chunks"]:
            assert len(set(t["version_A"][at : at + end - start])) == 1
            at += end - start
