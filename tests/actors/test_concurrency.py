"""How many episodes run at once: the rule, and that it finds the place where the engine is full and no queue grows."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.actors.concurrency import Concurrency, Pressure, adapt, free_memory_mb
from ale.actors.episodes import Episodes
from ale.bus import Bus
from ale.errors import WorkerDied
from ale.messages import EngineStatistics
from ale.supervisor import Supervisor
from ale.testing.clock import run

CALM = {"engine_running": 16, "engine_waiting": 0, "kv_used": 0.3, "sandbox_room": 100}


@pytest.mark.parametrize(
    ("limit", "running", "seen", "then"),
    [
        (32, 32, {}, 34),  # all taken, no pressure: a sixteenth more
        (8, 8, {}, 9),  # at least one
        (64, 64, {}, 64),  # never more than the most
        (32, 20, {}, 32),  # free places: it is not the limit that binds
        (32, 32, {"engine_waiting": 2}, 34),  # a few that wait for the next step are no queue
        (32, 32, {"engine_waiting": 3}, 24),
        (32, 32, {"kv_used": 0.97}, 24),
        (32, 32, {"sandbox_room": 0}, 24),
        (32, 12, {"sandbox_room": 0}, 9),  # from what really runs: else it would take long to be felt
        (1, 1, {"sandbox_room": 0}, 1),
    ],
)
def test_the_rule(limit: int, running: int, seen: dict[str, float], then: int) -> None:
    assert adapt(limit, Pressure(running=running, **CALM | seen), most=64) == then  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    limit=st.integers(1, 500),
    running=st.integers(0, 500),
    engine_running=st.integers(0, 500),
    engine_waiting=st.integers(0, 500),
    kv_used=st.floats(0, 1),
    sandbox_room=st.integers(-5, 500),
    most=st.integers(1, 500),
)
def test_the_limit_stays_between_one_and_the_most(most: int, limit: int, **seen: int) -> None:
    limit = min(limit, most)
    assert 1 <= adapt(limit, Pressure(**seen), most=most) <= most  # type: ignore[arg-type]


def statistics(running: int, waiting: int) -> EngineStatistics:
    return EngineStatistics(
        version=0, running=running, waiting=waiting, parked=0, generated_tokens=0, prefilled_tokens=0,
        reused_tokens=0, recomputed_tokens=0,
    )  # fmt: skip


def test_it_settles_where_the_engine_is_full_and_few_wait() -> None:
    """64 places at most, an engine of 16 rows; an episode generates half of its time, so 32 episodes fill it."""
    rows, most, seen = 16, 64, list[int]()

    async def scenario() -> None:
        episodes, bus = Episodes(most), Bus()
        engine = asyncio.Semaphore(rows)
        wanting = 0

        async def episode(n: int) -> None:
            nonlocal wanting
            while True:
                async with episodes.place(f"r{n}"):
                    await asyncio.sleep(2.0 + n % 7 / 7)  # tools
                    wanting += 1
                    async with engine:
                        await asyncio.sleep(2.0)
                    wanting -= 1

        async def look() -> EngineStatistics:
            return statistics(min(rows, wanting), max(0, wanting - rows))

        async with Supervisor(bus) as supervisor:
            await supervisor.start(Concurrency(episodes, look, lambda: 1000, most=most, adaptive=True))
            work = [asyncio.create_task(episode(n)) for n in range(200)]
            for _ in range(200):
                await asyncio.sleep(1.0)
                seen.append(episodes.limit)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    run(scenario())
    settled = seen[60:]
    assert 24 <= sum(settled) / len(settled) <= 44
    assert max(settled) < most


def test_an_engine_that_does_not_answer_changes_nothing() -> None:
    async def scenario() -> None:
        async def dead() -> EngineStatistics:
            raise WorkerDied("gone")

        episodes, bus = Episodes(8), Bus()
        async with Supervisor(bus) as supervisor:
            actor = Concurrency(episodes, dead, lambda: 0, most=8, adaptive=True)
            await supervisor.start(actor)
            await asyncio.sleep(30.0)
            assert (episodes.limit, actor.seen) == (4, None)

    run(scenario())


def test_without_adaptation_it_only_looks() -> None:
    async def scenario() -> None:
        async def look() -> EngineStatistics:
            return statistics(3, 99)

        episodes, bus = Episodes(8), Bus()
        async with Supervisor(bus) as supervisor:
            actor = Concurrency(episodes, look, lambda: 0, most=8, adaptive=False)
            await supervisor.start(actor)
            await asyncio.sleep(5.0)
            assert episodes.limit == 8
            assert actor.seen == statistics(3, 99)

    run(scenario())


def test_this_machine_says_how_much_memory_is_free() -> None:
    assert free_memory_mb() > 16
