"""Evaluations beside training: one after the other, none lost to a stop."""

from __future__ import annotations

import asyncio

import pytest

from ale.actors.evaluator import Evaluator
from ale.bus import Bus
from ale.config import EvalConfig, RunConfig
from ale.data.books import Books
from ale.errors import Interrupted, SandboxError
from ale.pipeline import missing_evaluations
from ale.progress import Rate
from ale.supervisor import Supervisor
from ale.testing.clock import run


def test_they_run_one_after_the_other_while_others_go_on() -> None:
    async def scenario() -> None:
        log: list[tuple[int, float]] = []
        clock = asyncio.get_running_loop()

        async def evaluate(update: int) -> None:
            await asyncio.sleep(10.0)
            log.append((update, clock.time()))

        async with Supervisor(Bus()) as supervisor:
            evaluator = Evaluator(evaluate)
            await supervisor.start(evaluator)
            await evaluator.drained()  # nothing is due
            for update in (5, 10, 10):
                evaluator.due(update)
            assert clock.time() == 0.0
            await evaluator.drained()
            assert log == [(5, 10.0), (10, 20.0)]
            evaluator.due(15)
            await evaluator.drained()
            assert log[-1] == (15, 30.0)

    run(scenario())


def test_an_error_of_an_evaluation_stops_the_run_with_its_cause() -> None:
    async def scenario() -> None:
        async def evaluate(update: int) -> None:
            raise SandboxError("no sandboxes left")

        with pytest.raises(SandboxError, match="no sandboxes left"):
            async with Supervisor(Bus()) as supervisor:
                evaluator = Evaluator(evaluate)
                await supervisor.start(evaluator)
                evaluator.due(1)
                await evaluator.drained()

    run(scenario())


def test_a_stopped_evaluation_is_not_counted_as_made() -> None:
    async def scenario() -> None:
        async def evaluate(update: int) -> None:
            raise Interrupted("stopped on request")

        async with Supervisor(Bus()) as supervisor:
            evaluator = Evaluator(evaluate)
            await supervisor.start(evaluator)
            evaluator.due(1)
            await supervisor.join(evaluator, deadline_s=5)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    await evaluator.drained()

    run(scenario())


def test_a_resumed_run_finds_what_was_due_and_not_made() -> None:
    config = RunConfig(eval=EvalConfig(every=4, beside=True))
    rate = Rate(success=0.5, ci95=(0.4, 0.6), n=20)
    books = Books(updates=13, rates={"heldout_4@4": rate, "heldout_before@0": rate})
    assert missing_evaluations(config, books) == [8, 12]
    assert missing_evaluations(RunConfig(), books) == []
