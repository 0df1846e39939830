"""A worker that is started again in its place: what it was asked is asked again, within a budget."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ale.config import PolicyConfig, RunConfig, WatchdogConfig
from ale.errors import LearnerError, RestartBudgetSpent, WorkerDied
from ale.messages import OpenEngine
from ale.policy.embedded import EmbeddedPolicy
from ale.policy.kept import KeptWorker
from ale.policy.open import patience_s
from ale.process import WorkerProcess
from ale.waiting import register

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def kept(*, stillborn: Iterable[int] = (), **settings: Any) -> KeptWorker:
    """`stillborn`: which of its processes, counted from 0, die on their way up."""
    from echo_worker import Echo, Exit

    env, number = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}, count()

    async def bring_up(worker: WorkerProcess) -> None:
        if next(number) in stillborn:
            await worker.ask(Exit(code=4), deadline_s=30)
        await worker.ask(Echo(text="up"), deadline_s=30)

    return KeptWorker(lambda: WorkerProcess("echo_worker", error=LearnerError, env=env), bring_up, **settings)


def test_what_a_killed_worker_had_in_hand_is_asked_of_its_successor() -> None:
    from echo_worker import Echo, Ignore

    async def scenario() -> None:
        async with kept(restarts=3) as it, asyncio.timeout(60):
            first = it.worker.pid
            asked = [asyncio.create_task(it.ask(Ignore(), deadline_s=50)) for _ in range(3)]
            await asyncio.sleep(0)
            os.kill(first, signal.SIGKILL)
            while register().counters["echo_worker_requests_asked_again"] < 3:
                await asyncio.sleep(0.01)
            assert it.worker.pid != first
            assert (await it.ask(Echo(text="on"), deadline_s=10)).text == "on"
            assert [answer.text for answer in await asyncio.gather(*asked)] == ["late"] * 3
            assert register().counters["echo_worker_restarts"] == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_worker_that_dies_on_its_way_up_is_started_again_too() -> None:
    from echo_worker import Echo

    async def scenario() -> None:
        async with kept(restarts=2, stillborn=(1,)) as it, asyncio.timeout(60):
            os.kill(it.worker.pid, signal.SIGKILL)
            assert (await it.ask(Echo(text="on"), deadline_s=10)).text == "on"
        async with kept(restarts=1, stillborn=(1,)) as it, asyncio.timeout(60):
            os.kill(it.worker.pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="could not be started again"):
                await it.ask(Echo(text="on"), deadline_s=10)
            with pytest.raises(RestartBudgetSpent, match="after 1 restarts within an hour"):
                await it.watch()

    asyncio.run(scenario())


def test_a_worker_that_keeps_dying_is_given_up_and_whoever_owns_it_is_told() -> None:
    from echo_worker import Exit

    async def scenario() -> None:
        async with kept(restarts=1) as it, asyncio.timeout(60):
            with pytest.raises(WorkerDied, match="exit code 3"):
                await it.ask(Exit(code=3), deadline_s=50)
            with pytest.raises(RestartBudgetSpent, match="after 1 restarts within an hour") as caught:
                await it.watch()
            assert isinstance(caught.value.__cause__, WorkerDied)

    asyncio.run(scenario())


def test_a_worker_that_is_given_up_for_its_silence_names_the_fields_that_give_it_more_time() -> None:
    from echo_worker import Stall

    async def scenario() -> None:
        async with kept(restarts=0, heartbeat_s=1.0) as it, asyncio.timeout(60):
            asked = asyncio.create_task(it.ask(Stall(), deadline_s=50))
            with pytest.raises(RestartBudgetSpent, match=r"1 times it was killed.*1 s.*watchdog.heartbeat_s"):
                await it.watch()
            with pytest.raises(WorkerDied):
                await asked

    asyncio.run(scenario())


def test_an_engine_whose_turns_may_take_longer_may_be_longer_at_one_step() -> None:
    watchdog, turns = WatchdogConfig(heartbeat_s=5.0), PolicyConfig(turn_deadline_s=1200.0)
    assert patience_s(RunConfig()) == 60.0
    assert patience_s(RunConfig(policy=turns)) == 600.0
    assert patience_s(RunConfig(watchdog=watchdog)) == 60.0
    assert patience_s(RunConfig(watchdog=WatchdogConfig(heartbeat_s=0.0), policy=turns)) == 0.0


@pytest.mark.parametrize("heartbeat_s", [60.0, 300.0])
def test_an_engine_that_is_stuck_is_killed_before_whoever_brings_new_weights_gives_up(heartbeat_s: float) -> None:
    config = RunConfig(watchdog=WatchdogConfig(heartbeat_s=heartbeat_s))
    settings = OpenEngine(model="m", weights_fd=None, slots=0, threads=1, rows=1)
    policy = EmbeddedPolicy(settings, config.policy.turn_deadline_s, 3, patience_s(config))
    assert policy.control_deadline_s > patience_s(config) + 5


@pytest.mark.full
def test_a_worker_that_is_stopped_is_killed_after_its_heart_beats_were_missed_and_started_again() -> None:
    from echo_worker import Echo, Ignore

    async def scenario() -> None:
        async with kept(restarts=3, heartbeat_s=1.5) as it, asyncio.timeout(60):
            watching = asyncio.create_task(it.watch())
            first = it.worker.pid
            os.kill(first, signal.SIGSTOP)
            asked = asyncio.create_task(it.ask(Ignore(), deadline_s=50))
            while not register().counters["echo_worker_requests_asked_again"]:
                await asyncio.sleep(0.01)
            await it.ask(Echo(text="on"), deadline_s=10)
            assert (await asked).text == "late"
            watching.cancel()
            await asyncio.wait({watching})

    asyncio.run(scenario())
