"""The tape that plays a recording: each point in its turn, each answer as it came."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from ale.data.recording import Answer, Entry
from ale.errors import ActorStopped, DeadlineExceeded, Diverged, SandboxError
from ale.player import Player
from ale.testing.clock import run


def value(of: Any) -> Answer:
    return Answer(msgspec.Raw(msgspec.msgpack.encode(of)))


async def never() -> Any:
    raise AssertionError("a replay asks nobody")


def test_points_are_passed_in_the_recorded_order_and_what_follows_one_comes_before_the_next() -> None:
    async def scenario() -> list[str]:
        player = Player([Entry("end", "b"), Entry("end", "a"), Entry("reset", "c", value("hello")), Entry("end", "b")])
        seen: list[str] = []

        async def walk(name: str, times: int) -> None:
            for _ in range(times):
                await player.reach("end", name)
                seen.append(name)

        async def ask() -> None:
            seen.append(await player.answer("reset", "c", never, str))

        async with asyncio.TaskGroup() as group:
            for work in (walk("a", 1), ask(), walk("b", 2), player.watch()):
                group.create_task(work)
        assert player.passed == 4
        return seen

    assert run(scenario()) == ["b", "a", "hello", "b"]


def test_an_error_comes_back_with_its_class_and_what_it_said() -> None:
    async def scenario() -> None:
        errors = [("SandboxError", "the sandbox died"), ("DeadlineExceeded", "a turn: no answer within 3 s")]
        player = Player([Entry("act", "a", Answer(error=error)) for error in errors])
        with pytest.raises(SandboxError, match=r"^the sandbox died$"):
            await player.answer("act", "a", never, str)
        with pytest.raises(DeadlineExceeded, match=r"^a turn: no answer within 3 s$"):
            await player.answer("act", "a", never, str)

    run(scenario())


@pytest.mark.parametrize("turns", [0, 1, 5, 2000])
def test_a_wait_that_was_given_up_ends_by_the_cancellation_that_comes_in_the_replay_too(turns: int) -> None:
    """Whether that comes before the turn of the entry or at it: then the next point has its turn."""

    async def scenario() -> None:
        entries = [Entry("end", "first"), Entry("turn", "a", Answer()), Entry("end", "last")]
        player = Player(entries)
        asked = asyncio.create_task(player.answer("turn", "a", never, str))
        await asyncio.sleep(0)
        if turns == 2000:  # long before its turn
            asked.cancel()
        await player.reach("end", "first")
        for _ in range(turns % 2000):
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await player.reach("end", "last")
        assert player.over.is_set()

    run(scenario())


def test_a_wait_that_was_given_up_and_is_not_cancelled_was_ended_by_a_deadline() -> None:
    async def scenario() -> None:
        player = Player([Entry("turn", "a", Answer()), Entry("end", "last")])
        with pytest.raises(TimeoutError):
            await player.answer("turn", "a", never, str)
        await player.reach("end", "last")

    run(scenario())


def test_a_point_that_nobody_reaches_is_named_with_those_that_were_reached() -> None:
    async def scenario() -> None:
        player = Player([Entry("end", "a")])
        waits = asyncio.create_task(player.reach("end", "b"))
        with pytest.raises(Diverged, match=r"after 0 points the recording goes on with: end a.*it has reached: end b"):
            await player.watch()
        player.release()
        await waits

    run(scenario())


def test_while_something_works_nothing_has_diverged() -> None:
    async def scenario() -> None:
        player = Player([Entry("step", "1")])

        async def learner() -> None:
            with player.working():
                await asyncio.sleep(3600)
            await player.reach("step", "1")

        async with asyncio.TaskGroup() as group:
            group.create_task(learner())
            group.create_task(player.watch())

    run(scenario())


def test_at_the_end_whoever_still_asks_is_told_that_it_is_over() -> None:
    async def scenario() -> None:
        player = Player([])
        assert player.over.is_set()
        asked = asyncio.create_task(player.answer("turn", "a", never, str))
        await asyncio.sleep(0)
        player.release()
        with pytest.raises(ActorStopped):
            await asked
        await player.reach("end", "a")

    run(scenario())
