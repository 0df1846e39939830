"""`ale agent` before a server that is not ours: vLLM with SmolLM2, twenty generated tasks. `just test-vllm` runs it.

A model of 135 million parameters solves next to nothing; that it calls tools at all is because the server holds it to
calls, though not to what a tool takes: nearly all are answered with an error. What is looked at is the agent: each
session comes to an end of its own, each call has its answer, nothing happens outside, and its books agree with those of
the server.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import msgspec
import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: just test-vllm", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families

from ale.agent.api import run_agent
from ale.agent.events import Ended, Said
from ale.agent.loop import Outcome
from ale.agent.session import EVENTS, Session, read_events
from ale.agent.settings import Settings
from ale.envs.families import TRAINED, make
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.policy.replica import until_up
from ale.policy.vllm_client import VllmClient
from ale.policy.vllm_process import ServerProcess
from ale.sandbox import open_engine
from ale.task import WORKDIR, Task

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
TASKS = [make(family, 1_000 + number) for number, family in zip(range(20), itertools.cycle(TRAINED), strict=False)]
AT_ONCE = 5
START_S = 300.0


@pytest.fixture(scope="module")
def server(smollm2: Path, loop: asyncio.Runner) -> Iterator[str]:
    """The address of a server as anybody would start it: nothing of `ale` in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port), "--model", str(smollm2), "--served-model-name", "smollm2"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", str(AT_ONCE)),
        *("--kv-cache-memory-bytes", str(2**30), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    process = ServerProcess(command, env, on_exit=lambda: None)
    url = f"http://127.0.0.1:{port}"

    async def start() -> None:
        client = VllmClient(url)
        try:
            await until_up("the server under test", client, process, START_S)
        finally:
            await client.close()

    try:
        loop.run(start())
        yield url
    finally:
        loop.run(process.stop())


def settings(url: str, tokenizer: Path) -> Settings:
    return msgspec.convert(
        {
            "system_prompt": "You work in a directory through tools. When the task is done, call finish.",
            "tools": ["shell", "read", "write", "finish"],
            "max_turns": 6,
            "command_timeout_s": 10.0,
            "max_output_chars": 400,
            "model": {
                "base_url": f"{url}/v1",
                "name": "smollm2",
                "tokenizer": str(tokenizer),
                "window": 4096,
                "max_tokens": 96,
                "temperature": 1.0,
                "retries": 0,
                # The template of this model has no tools in it; the server lets it write calls of them by name.
                "extra": {"tool_choice": "required", "seed": 0},
            },
        },
        Settings,
    )


def lay_out(task: Task, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in task.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
        path.chmod(file.mode)
    return folder


async def counted(url: str, name: str) -> int:
    """One of the counters that the server itself keeps."""
    async with httpx.AsyncClient() as client:
        families = text_string_to_metric_families((await client.get(f"{url}/metrics")).text)
    samples = (sample for family in families for sample in family.samples)
    return round(sum(sample.value for sample in samples if sample.name == f"vllm:{name}_total"))


def test_twenty_generated_tasks_each_end_by_themselves_and_the_server_counts_what_the_agent_counts(
    server: str, smollm2: Path, tmp_path: Path, loop: asyncio.Runner
) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")

    async def play(task: Task, turn: asyncio.Semaphore) -> Outcome:
        folder, session = lay_out(task, tmp_path / "w" / task.id), Session(tmp_path / "s" / task.id)
        async with turn:
            return await run_agent(task.instruction, folder, settings=settings(server, smollm2), session=session)

    async def scores() -> list[float]:
        async with open_engine("local") as engine:
            found = []
            for task in TASKS:
                env = TerminalEnv(task, engine, lambda task, snapshot: grade(engine, task, snapshot))
                await env.reset()
                await env.sandbox.upload(tmp_path / "w" / task.id, WORKDIR)
                found.append((await env.score()).reward)
                await env.close()
            return found

    async def all_of_them() -> tuple[list[Outcome], tuple[int, int]]:
        before = [await counted(server, name) for name in ("prompt_tokens", "generation_tokens")]
        turn = asyncio.Semaphore(AT_ONCE)
        outcomes = await asyncio.gather(*(play(task, turn) for task in TASKS))
        after = [await counted(server, name) for name in ("prompt_tokens", "generation_tokens")]
        return outcomes, (after[0] - before[0], after[1] - before[1])

    outcomes, tokens = loop.run(all_of_them())
    statuses = Counter(outcome.status for outcome in outcomes)
    assert set(statuses) <= {"finished", "answered", "turn_limit", "stuck"}, statuses
    assert tokens == (sum(o.usage.prompt_tokens for o in outcomes), sum(o.usage.completion_tokens for o in outcomes))
    calls, failed = Counter[str](), 0
    for task, outcome in zip(TASKS, outcomes, strict=True):
        events = list(read_events(tmp_path / "s" / task.id / EVENTS))
        ended = events[-1]
        assert isinstance(ended, Ended)
        assert ended.status == outcome.status
        said = [event for event in events if isinstance(event, Said)]
        results = {event.message.call_id for event in said if event.message.role == "tool"}
        for event in said:
            for call in event.message.calls:
                calls[call.name] += 1
                assert call.id in results
            failed += event.error
    assert calls.total() - calls["finish"] >= len(TASKS), calls  # it prefers to write files
    assert outside.read_text() == "untouched"
    rewards = loop.run(scores())
    print(f"{statuses}, {calls}, {failed} failed calls, {tokens} tokens, reward {sum(rewards):g} of {len(rewards)}")
