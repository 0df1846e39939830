"""A worker that is started again in its place: what it was asked is asked again, within a budget."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from ale.errors import LearnerError, RestartBudgetSpent, WorkerDied
from ale.policy.kept import KeptWorker
from ale.process import WorkerProcess
from ale.waiting import register

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def kept(**settings: Any) -> KeptWorker:
    from echo_worker import Echo

    env = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}

    async def bring_up(worker: WorkerProcess) -> None:
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
