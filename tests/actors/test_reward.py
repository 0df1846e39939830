"""The reward actor over the bus: a few at once, names for snapshots, and errors that belong to whoever asked."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import ale.actors.reward
from ale.actors.loop_lag import LoopLag
from ale.actors.reward import Reward
from ale.bus import Bus
from ale.errors import EvaluatorError
from ale.messages import Score
from ale.supervisor import Supervisor
from ale.testing.clock import run


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was graded, in order; grading takes a second, and a snapshot that is an error is raised."""
    seen: list[Any] = []

    async def grade(engine: Any, task: Any, snapshot: Any, *, label: str = "") -> Score:
        seen.append((task.id, snapshot, label))
        await asyncio.sleep(1.0)
        if isinstance(snapshot, Exception):
            raise snapshot
        return Score(reward=float(snapshot))

    monkeypatch.setattr(ale.actors.reward, "grade", grade)
    return seen


def test_each_asker_gets_the_score_of_its_own_snapshot_a_few_at_a_time(graded: list[Any], with_tasks: Any) -> None:
    async def scenario() -> tuple[list[float], float]:
        bus = Bus(plain=True)
        async with Supervisor(bus) as supervisor:
            reward = Reward(None, concurrency=2, label="mine")  # type: ignore[arg-type]
            await supervisor.start(reward)
            began = asyncio.get_running_loop().time()
            task = with_tasks(1)[0]  # of one task: the snapshots must not be mistaken for one another
            scores = await asyncio.gather(*(reward.ask(bus, task, snapshot) for snapshot in (0, 1, 2, 3)))  # type: ignore[arg-type]
            assert reward._snapshots == {}
            return [s.reward for s in scores], asyncio.get_running_loop().time() - began

    rewards, took_s = run(scenario())
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    assert took_s == pytest.approx(2.0)
    assert graded[0] == ("t0", 0, "mine")


def test_tests_that_crash_are_an_error_of_whoever_asked_and_the_actor_goes_on(
    graded: list[Any], with_tasks: Any
) -> None:
    async def scenario() -> float:
        bus = Bus(plain=True)
        async with Supervisor(bus) as supervisor:
            reward = Reward(None, concurrency=1)  # type: ignore[arg-type]
            await supervisor.start(reward)
            task = with_tasks(1)[0]
            with pytest.raises(EvaluatorError, match="the tests crashed"):
                await reward.ask(bus, task, EvaluatorError("the tests crashed"))  # type: ignore[arg-type]
            assert reward._snapshots == {}
            return (await reward.ask(bus, task, 1)).reward  # type: ignore[arg-type]

    assert run(scenario()) == 1.0


def test_an_asker_that_is_cancelled_leaves_no_snapshot_behind(graded: list[Any], with_tasks: Any) -> None:
    async def scenario() -> None:
        bus = Bus(plain=True)
        async with Supervisor(bus) as supervisor:
            reward = Reward(None, concurrency=1)  # type: ignore[arg-type]
            await supervisor.start(reward)
            asking = asyncio.create_task(reward.ask(bus, with_tasks(1)[0], 1))  # type: ignore[arg-type]
            await asyncio.sleep(0.5)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert reward._snapshots == {}

    run(scenario())


def test_the_lag_of_the_loop_is_how_late_its_timers_are() -> None:
    async def scenario() -> tuple[float, float]:
        lag = LoopLag()
        assert lag.quantile_ms(0.99) == 0.0
        async with Supervisor(Bus()) as supervisor:
            await supervisor.start(lag)
            await asyncio.sleep(0.05)
            time.sleep(0.2)  # noqa: ASYNC251  holds the loop up, which is what is measured
            await asyncio.sleep(0.05)
        return lag.quantile_ms(1.0), lag.quantile_ms(0.0)

    worst, best = asyncio.run(scenario())
    assert worst >= 150
    assert best < worst
