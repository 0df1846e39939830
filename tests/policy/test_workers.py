"""The engine's and the learner's process, each as the controller sees it: over a socket, with real models."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ale.config import AlgorithmConfig, LearnerConfig
from ale.errors import LearnerError, ModelError, PolicyError
from ale.learner.weights import create_memory
from ale.messages import (
    Chunk,
    Demonstration,
    Generate,
    Imitate,
    OpenEngine,
    OpenLearner,
    Sample,
    SaveModel,
    SaveState,
    TrainStep,
    Trajectory,
)
from ale.policy.embedded import open_embedded
from ale.process import WorkerProcess
from ale.wire import Array

Ask = Callable[..., Generate]
DEADLINE_S = 250.0


def engine(model: Path, fd: int | None = None) -> OpenEngine:
    return OpenEngine(model=str(model), weights_fd=fd, slots=3, threads=1, rows=4)


@asynccontextmanager
async def learner(model: Path, fd: int, state: Path | None = None) -> AsyncIterator[WorkerProcess]:
    settings = OpenLearner(
        model=str(model),
        weights_fd=fd,
        slots=3,
        threads=1,
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(learning_rate=3e-3),
        temperature=1.0,
        state=None if state is None else str(state),
    )
    async with WorkerProcess("ale.learner.learner_process", error=LearnerError, pass_fds=(fd,)) as worker:
        await worker.ask(settings, deadline_s=DEADLINE_S)
        yield worker


@asynccontextmanager
async def memory() -> AsyncIterator[int]:
    fd = create_memory()
    try:
        yield fd
    finally:
        os.close(fd)


def imitate() -> Imitate:
    shown = Demonstration(tokens_T=Array.of(range(10, 30), "int32"), chunks=(Chunk(5, 20, "answer"),))
    return Imitate(demonstrations=(shown,), learning_rate=1e-2)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


async def until(tokens: int, policy: Any) -> None:
    """Until the engine has sampled so many tokens."""
    async with asyncio.timeout(DEADLINE_S):
        while (await policy.statistics()).generated_tokens < tokens:
            pass


def tokens_of(values: Iterable[int]) -> Array:
    return Array.of(list(values), "int32")


def test_weights_that_come_in_mid_turn_give_a_turn_of_two_versions(nano_path: Path, ask: Ask) -> None:
    async def scenario() -> None:
        async with memory() as fd, learner(nano_path, fd) as worker, open_embedded(engine(nano_path, fd)) as policy:
            request = ask("s", range(10, 30), max_tokens=400, seed=7)
            turn = asyncio.create_task(policy.generate(request))
            await until(20, policy)
            metrics = await worker.ask(imitate(), deadline_s=DEADLINE_S)
            await policy.load_weights(metrics.version, metrics.slot)
            version_A = (await turn).version_A.numpy()
            assert policy.version == 1
            assert set(version_A.tolist()) == {0, 1}
            assert (np.diff(version_A) >= 0).all()
            assert (version_A == 0).sum() >= 20

    run(scenario)


def test_a_model_that_is_not_there_is_an_error_of_whoever_opens_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ModelError, match=r"model.path: there is no directory"):
            async with open_embedded(engine(tmp_path / "nowhere")):
                pass
        async with memory() as fd:
            with pytest.raises(ModelError, match=r"model.path: .* holds no complete model"):
                async with learner(tmp_path, fd):
                    pass

    run(scenario)


def test_the_engine_serves_on_after_a_session_that_ended_in_mid_turn_and_requests_it_cannot_run(
    nano_path: Path, ask: Ask
) -> None:
    async def scenario() -> None:
        async with open_embedded(engine(nano_path)) as policy:
            cut = asyncio.create_task(policy.generate(ask("cut", range(10, 30), max_tokens=1500)))
            other = asyncio.create_task(policy.generate(ask("other", range(10, 30), max_tokens=60)))
            await until(10, policy)
            await policy.end_session("cut")
            with pytest.raises(PolicyError, match="session cut was ended"):
                await cut
            assert len((await other).tokens_A) == 60
            assert (await policy.statistics()).running == 0
            with pytest.raises(PolicyError, match="prompt_T is empty"):
                await policy.generate(ask("s", []))
            with pytest.raises(PolicyError, match="opened without a weight ring"):
                await policy.load_weights(1, 1)
            assert len((await policy.generate(ask("s", [10, 11], max_tokens=3))).tokens_A) == 3

    run(scenario)


def test_the_learner_serves_on_after_an_error_and_saves_what_another_goes_on_from(
    nano_path: Path, tmp_path: Path
) -> None:
    broken = Trajectory(
        id="t",
        group="g",
        task="t",
        family="copy",
        level=1,
        tokens_T=tokens_of([10, 11, 12]),
        chunks=(Chunk(1, 9, "answer"),),
        logp_A=Array.of([-1.0] * 8, "float32"),
        logp_sampled_A=Array.of([-1.0] * 8, "float32"),
        version_A=tokens_of([1] * 8),
        reward=1.0,
    )

    async def scenario() -> None:
        async with memory() as fd:
            async with learner(nano_path, fd) as first:
                assert (await first.ask(imitate(), deadline_s=DEADLINE_S)).version == 1
                with pytest.raises(LearnerError, match=r"ValueError: chunk 1\.\.9"):
                    await first.ask(TrainStep(samples=(Sample(broken, 1.0),)), deadline_s=DEADLINE_S)
                saved = await first.ask(SaveState(path=str(tmp_path / "state")), deadline_s=DEADLINE_S)
                assert saved.problem is None
                expected = await first.ask(imitate(), deadline_s=DEADLINE_S)
                nowhere = await first.ask(SaveState(path=str(tmp_path / "no" / "state")), deadline_s=DEADLINE_S)
                assert "No such file or directory" in (nowhere.problem or "")
                assert (await first.ask(SaveModel(path=str(tmp_path / "hf")), deadline_s=DEADLINE_S)).problem is None
            async with learner(nano_path, fd, tmp_path / "state") as second:
                found = await second.ask(imitate(), deadline_s=DEADLINE_S)
            assert (found.version, found.loss, found.grad_norm) == (2, expected.loss, expected.grad_norm)
        assert (tmp_path / "hf" / "model.safetensors").is_file()

    run(scenario)
