"""The real thing: a vLLM server on CPU, SmolLM2 in float32, our weights. `just test-vllm` makes the environment."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

import ale
from ale.config import AgentConfig, EvalConfig, LearnerConfig, PolicyConfig, RolloutConfig, RunConfig, TasksConfig
from ale.messages import Chunk, Generate, Sampling, Turn
from ale.wire import Array

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: just test-vllm", allow_module_level=True)

import torch

from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.models.load import load_model, load_tokenizer
from ale.policy.open import Learning, open_policy
from ale.policy.served import ServedPolicy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
TOLERANCE = 1e-4
PROMPTS = ("What is the capital of France?", "Name a colour.", "Count to ten.", "Write a line about the sea.")


def config() -> RunConfig:
    return RunConfig(
        policy=PolicyConfig(kind="vllm", turn_deadline_s=1000.0, kv_cache_gb=0.5),
        agent=AgentConfig(max_context_tokens=512),
        rollout=RolloutConfig(concurrency=16),
    )


class Weights:
    """Stands in for the learner: one model, which changes and is written where the policy says."""

    def __init__(self, path: Path) -> None:
        self.model = load_model(path)
        self.tokenizer = load_tokenizer(path)

    def change(self, seed: int) -> None:
        """Every tensor, by about a fiftieth of its spread: the embedding, which is the head too, as well."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * (parameter.std() + 0.01) * noise

    async def save(self, path: Path) -> None:
        def write() -> None:
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)

        await asyncio.to_thread(write)

    def logp(self, prompt: list[int], turn: Turn, temperature: float = 1.0) -> Any:
        tokens = [*prompt, *turn.tokens_A.numpy().tolist()]
        (batch,) = split([Array.of(tokens, "int32")], [(Chunk(len(prompt), len(tokens), "answer"),)], 100_000)
        with torch.no_grad():
            return action_logp(self.model, batch, temperature)[0].numpy()


class Bench:
    """One server for the tests of this module, which keep its loop: each leaves it running."""

    def __init__(self, path: Path) -> None:
        self.weights = Weights(path)
        self.version = 0
        self.path = path
        self.prompts = [
            self.weights.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in PROMPTS
        ]

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[ServedPolicy]:
        async with open_policy(config(), self.path, Learning(-1, 0, self.weights.save)) as policy:
            assert isinstance(policy, ServedPolicy)
            self.policy = policy
            yield policy

    async def sync(self, seed: int) -> None:
        self.weights.change(seed)
        self.version += 1
        await self.policy.load_weights(self.version, 0)

    def ask(self, session: str, number: int, **sampling: Any) -> Coroutine[Any, Any, Turn]:
        prompt_T = Array.of(self.prompts[number % len(self.prompts)], "int32")
        return self.policy.generate(
            Generate(session=session, prompt_T=prompt_T, sampling=Sampling(seed=number, **sampling))
        )


@pytest.fixture(scope="module")
def bench(smollm2: Path, loop: asyncio.Runner) -> Iterator[Bench]:
    torch.set_num_threads(1)
    bench = Bench(smollm2)
    opened = bench.opened()
    loop.run(opened.__aenter__())
    yield bench
    loop.run(opened.__aexit__(None, None, None))


def test_log_probabilities_are_those_of_the_training_forward_before_and_after_a_sync(
    bench: Bench, loop: asyncio.Runner
) -> None:
    async def scenario() -> None:
        before: list[list[int]] = []
        for round_ in range(3):
            if round_:
                await bench.sync(round_)
            temperatures = (1.0, 1.0, 0.7, 0.0)
            turns = await asyncio.gather(
                *(bench.ask(f"r{round_}/{n}", n, max_tokens=24, temperature=t) for n, t in enumerate(temperatures))
            )
            for number, (turn, temperature) in enumerate(zip(turns, temperatures, strict=True)):
                expected = bench.weights.logp(bench.prompts[number], turn, temperature or 1.0)
                np.testing.assert_allclose(turn.logp_A.numpy(), expected, atol=TOLERANCE, rtol=0)
                assert set(turn.version_A.numpy().tolist()) == {round_}
                assert turn.finish == "length"
            said = [turn.tokens_A.numpy().tolist() for turn in turns]
            assert said != before, "weights so different say the same: they did not arrive"
            before = said

    loop.run(scenario())


def test_a_turn_ends_with_its_stop_token_and_says_so(bench: Bench, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        free = (await bench.ask("free", 1, max_tokens=12, temperature=0.0)).tokens_A.numpy().tolist()
        stop = free[5]
        turn = await bench.ask("stopped", 1, max_tokens=12, temperature=0.0, stop=(stop,))
        assert turn.finish == "stop"
        assert turn.tokens_A.numpy().tolist() == free[: free.index(stop) + 1]

    loop.run(scenario())


def test_a_sync_in_the_middle_of_sixteen_long_answers_loses_no_token(bench: Bench, loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        asked, old = 16, bench.version
        before = Weights(bench.path)
        before.model.load_state_dict(bench.weights.model.state_dict())
        running = [asyncio.create_task(bench.ask(f"long/{n}", n, max_tokens=160), name=str(n)) for n in range(asked)]
        replica = bench.policy._replicas[0]
        async with asyncio.timeout(120):  # until all have some tokens: a short one asked after them has come back
            await bench.ask("probe", 0, max_tokens=12)
        await bench.sync(11)
        turns = await asyncio.gather(*running)
        assert replica.restarted == bench.policy.reissued == 0
        both = 0
        for number, turn in enumerate(turns):
            version_A, logp_A = turn.version_A.numpy(), turn.logp_A.numpy()
            assert len(turn.tokens_A) == len(logp_A) == len(version_A) == 160
            assert (np.diff(version_A) >= 0).all()
            assert set(version_A.tolist()) <= {old, bench.version}
            both += len(set(version_A.tolist())) == 2
            prompt = bench.prompts[number % len(PROMPTS)]
            # Each token under the weights it is labelled with: not one on the wrong side, no key of the old ones left.
            expected = np.where(version_A == old, before.logp(prompt, turn), bench.weights.logp(prompt, turn))
            np.testing.assert_allclose(logp_A, expected, atol=TOLERANCE, rtol=0)
        assert both == asked

    loop.run(scenario())


@pytest.mark.parametrize("who", ["server", "engine"])
def test_a_server_killed_in_mid_answer_is_brought_back_and_no_answer_is_lost(
    bench: Bench, loop: asyncio.Runner, who: str
) -> None:
    async def scenario() -> None:
        replica, reissued = bench.policy._replicas[0], bench.policy.reissued
        assert replica.server is not None
        restarted, first = replica.restarted, replica.server.pid
        running = [asyncio.create_task(bench.ask(f"{who}/{n}", n, max_tokens=96), name=str(n)) for n in range(6)]
        async with asyncio.timeout(120):
            await bench.ask(f"{who}/probe", 0, max_tokens=12)
        assert first is not None
        victim = first if who == "server" else _engine_of(first)
        os.kill(victim, signal.SIGKILL)
        turns = await asyncio.gather(*running)
        assert replica.restarted == restarted + 1
        assert bench.policy.reissued - reissued >= 6
        for number, turn in enumerate(turns):
            assert len(turn.tokens_A) == 96
            assert set(turn.version_A.numpy().tolist()) == {bench.version}
            expected = bench.weights.logp(bench.prompts[number % len(PROMPTS)], turn)
            np.testing.assert_allclose(turn.logp_A.numpy(), expected, atol=TOLERANCE, rtol=0)
        assert not psutil.pid_exists(victim)

    loop.run(scenario())


def _engine_of(server: int) -> int:
    (engine,) = [
        c.pid for c in psutil.Process(server).children(recursive=True) if "EngineCore" in " ".join(c.cmdline())
    ]
    return int(engine)


class Length:
    """Rewards one of two answers to the same question: enough for a gradient."""

    def __init__(self, task: ale.Task) -> None:
        self.task = task

    def reset(self) -> str:
        return "Say anything."

    def step(self, action: str) -> ale.Step:
        return ale.Step("", float(sum(action.encode()) % 2), True)


def test_two_updates_of_ipa_and_an_engine_killed_between_them(smollm2: Path, tmp_path: Path) -> None:
    c = msgspec.structs.replace(
        config(),
        name="e2e",
        runs_dir=str(tmp_path),
        model=ale.config.ModelConfig(path=str(smollm2)),
        tasks=TasksConfig(heldout=0, families=0),
        agent=AgentConfig(max_turns=1, max_turn_tokens=12, max_context_tokens=256, episode_timeout_s=1000),
        rollout=RolloutConfig(group_size=4, groups_per_step=2, max_lag=1, concurrency=8),
        learner=LearnerConfig(updates=2, learning_rate=1e-5),
        eval=EvalConfig(),
    )

    async def scenario() -> None:
        async with ale.open_run(c, environment=Length) as run:
            async for update in run.updates():
                assert update.metrics.values["truth_max"] < 1e-3
                if update.number == 1:
                    (server,) = [p for p in psutil.Process().children() if "vllm_launch" in " ".join(p.cmdline())]
                    server.kill()
            last = update
        assert run.summary is not None
        assert run.summary.updates == 2
        assert run.summary.lost_samples == 0
        assert last.values["engine_restarts"] == 1

    asyncio.run(scenario())
    assert not [p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline())]
