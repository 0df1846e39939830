"""Redundancy, stragglers and fairness: what is not needed ends at once, and nobody holds what others wait for."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from ale.actors.episodes import Episodes, HeardPolicy
from ale.messages import Generate, Rollout, Sampling
from ale.testing.clock import run
from ale.testing.fakes import Play
from ale.testing.random_policy import RandomPolicy
from ale.wire import Array


def member(rollout: Rollout) -> int:
    return int(rollout.id.split("/")[1])


def trained(done: Any) -> list[str]:
    return [s.trajectory.id for step in done.learner.steps for s in step.samples]


def test_the_first_members_to_finish_are_kept_and_the_others_end_at_once(loop: Any) -> None:
    def script(rollout: Rollout) -> Play:
        n = member(rollout)
        return Play(reward=float(n % 2), latency_s=100.0 if n in (1, 4) else 2.0 + n, tokens=10)

    async def until_it_trains(tried: Any) -> None:
        await asyncio.sleep(7.5)  # g1/0, g1/2, g1/3 and g1/5 have ended after 7 s at most
        assert len(tried.learner.steps) == 1
        assert sorted(tried.envs.cancelled) == ["g1/1", "g1/4"]
        assert tried.episodes.running == 0
        assert tried.ledger.statistics().running == 0

    done = loop(script, group_size=4, extra_members=2, groups_per_step=1, max_lag=0, updates=1, latency_s=lambda n: 9.0)
    run(done.run(until_it_trains))
    assert trained(done) == ["g1/0", "g1/2", "g1/3", "g1/5"]  # kept members in the order of their starts
    books = done.ledger.statistics()
    assert books.dropped == {"redundant": 2}
    assert books.dropped_tokens["redundant"] == 1.0  # each of them samples its first of ten tokens for 10 s
    assert books.lost == 0


def test_members_that_finish_in_the_same_moment_are_counted_once(loop: Any) -> None:
    done = loop(
        lambda r: Play(reward=float(member(r) % 2), latency_s=3.0),
        group_size=2, extra_members=3, groups_per_step=2, updates=4, latency_s=lambda n: 1.0,
    )  # fmt: skip
    run(done.run())
    assert all(len(step.samples) == 4 for step in done.learner.steps)
    assert len(set(trained(done))) == 16
    assert done.ledger.at_the_end().lost == 0


def test_a_redundant_rollout_gives_its_place_to_the_next_in_line(loop: Any) -> None:
    def script(rollout: Rollout) -> Play:
        return Play(reward=float(member(rollout) % 2), latency_s=1.0 if member(rollout) < 2 else 1000.0)

    async def scenario() -> float:
        done = loop(
            script, group_size=2, extra_members=1, groups_per_step=1, max_lag=0, concurrency=3, updates=20,
            latency_s=lambda n: 1.0,
        )  # fmt: skip
        await done.run()
        assert done.dropped()["redundant"] == 20
        return asyncio.get_running_loop().time()

    assert run(scenario()) < 60


def test_extra_groups_without_lag_train_on_the_first_and_end_the_rest(loop: Any) -> None:
    began: list[bool] = []

    def script(rollout: Rollout) -> Play:
        began.append(done.pending)
        slow = int(rollout.group[1:]) % 4 == 0
        return Play(reward=float(member(rollout)), latency_s=500.0 if slow else 3.0, tokens=100)

    done = loop(script, groups_per_step=3, extra_groups=1, max_lag=0, updates=6, latency_s=lambda n: 5.0)

    async def scenario() -> float:
        await done.run()
        return asyncio.get_running_loop().time()

    assert run(scenario()) < 6 * 10  # not one of the slow ones was waited for
    assert not any(began)  # and none began under an update
    groups = {s.trajectory.group for step in done.learner.steps for s in step.samples}
    assert all(int(g[1:]) % 4 for g in groups)
    books = done.ledger.statistics()
    assert books.dropped["redundant"] == 6 * 2
    assert done.learner.lags == [0] * 6


def test_a_straggler_is_ended_counted_and_replaced(loop: Any) -> None:
    def script(rollout: Rollout) -> Play:
        slow = rollout.id == "g1/0"
        return Play(reward=float(member(rollout) % 2), latency_s=900.0 if slow else 3.0, tokens=90 if slow else 2)

    done = loop(script, straggler_s=30.0, groups_per_step=1, max_lag=0, updates=1)
    run(done.run())
    assert trained(done) == ["g1/1", "g1/2"]
    books = done.ledger.statistics()
    assert books.dropped == {"straggler": 1}
    assert books.dropped_tokens == {"straggler": 3.0}


def test_a_straggler_is_judged_by_how_long_the_others_took(loop: Any) -> None:
    def script(rollout: Rollout) -> Play:
        slow = int(rollout.group[1:]) > 10 and member(rollout) == 0
        return Play(reward=float(member(rollout) % 2), latency_s=500.0 if slow else 4.0, tokens=50)

    async def scenario() -> float:
        done = loop(script, straggler_factor=5.0, groups_per_step=2, max_lag=0, updates=10)
        await done.run()
        assert done.dropped()["straggler"] >= 8
        assert done.ledger.books.durations == pytest.approx([4.0] * 40)
        return asyncio.get_running_loop().time()

    assert run(scenario()) < 5 * 4 + 5 * (20 + 4) + 1


def test_a_task_that_is_always_late_is_given_up_and_its_slot_goes_on(loop: Any, caplog: Any) -> None:
    def script(rollout: Rollout) -> Play:
        return Play(reward=float(member(rollout) % 2), latency_s=1e4 if rollout.task.id == "t0" else 3.0)

    done = loop(script, straggler_s=10.0, groups_per_step=1, max_lag=1, updates=30, on_stale="wait")
    run(done.run())
    assert done.dropped()["straggler"] == 6
    assert "task t0 keeps failing and is given up: 6 straggler" in caplog.text


def test_a_slow_task_holds_its_own_slot_and_no_other(loop: Any) -> None:
    """Fairness: with 4 slots, one of which is held for ever, the others go round at their own pace."""

    def script(rollout: Rollout) -> Play:
        return Play(reward=float(member(rollout)), latency_s=1e5 if rollout.task.id == "t0" else 4.0, tokens=1)

    async def scenario(slow: bool) -> float:
        done = loop(
            script if slow else lambda r: Play(reward=float(member(r)), latency_s=4.0),
            groups_per_step=1, max_lag=3, updates=60, latency_s=lambda n: 0.1,
        )  # fmt: skip
        await done.run()
        return asyncio.get_running_loop().time()

    without, with_one = run(scenario(False)), run(scenario(True))
    # it is ended once it is too old: three quarters of the slots for a while, then all of them
    assert without <= with_one < 1.1 * without


def test_moderate_tasks_get_the_rollouts(loop: Any) -> None:
    def script(rollout: Rollout) -> Play:
        half = rollout.task.family == "even"
        return Play(reward=float(half and member(rollout) % 2), latency_s=1.0)  # the odd ones are never solved

    done = run(loop(script, selection="moderate", baseline="none", updates=60, concurrency=4).run())
    families = [rollout.task.family for rollout in done.envs.received]
    assert families.count("even") / len(families) > 0.8


def test_places_are_given_in_order_and_none_is_lost_to_a_cancellation() -> None:
    async def scenario() -> None:
        episodes, order = Episodes(2), list[int]()

        async def one(n: int) -> None:
            async with episodes.place(f"r{n}"):
                order.append(n)
                await asyncio.sleep(1.0)

        tasks = [asyncio.create_task(one(n)) for n in range(8)]
        await asyncio.sleep(0.5)
        assert (episodes.running, episodes.waiting) == (2, 6)
        tasks[2].cancel()  # it waits
        asyncio.get_running_loop().call_later(0.5, tasks[3].cancel)  # in the moment in which its place is free
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [n for n in order if n != 3] == [0, 1, 4, 5, 6, 7]
        assert episodes.running == episodes.waiting == 0
        async with episodes.place("a"), episodes.place("b"):
            assert episodes.running == 2

    run(scenario())


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_wait_cancelled_in_the_moment_in_which_a_place_is_free_leaves_nothing_behind(cancel_first: bool) -> None:
    async def scenario() -> None:
        episodes, leave = Episodes(1), asyncio.Event()

        async def holder() -> None:
            async with episodes.place("holder"):
                await leave.wait()

        async def waiter(n: int) -> None:
            async with episodes.place(f"w{n}"):
                pass

        held = asyncio.create_task(holder())
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(waiter(n)) for n in range(2)]
        await asyncio.sleep(0)
        if cancel_first:
            waiting[0].cancel()
        leave.set()
        await asyncio.sleep(0)
        if not cancel_first:
            waiting[0].cancel()
        ended = await asyncio.gather(held, *waiting, return_exceptions=True)
        assert [type(e) for e in ended] == [type(None), asyncio.CancelledError, type(None)]
        assert episodes.running == episodes.waiting == 0
        async with asyncio.timeout(1), episodes.place("another"):
            pass

    run(scenario())


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4)])
def test_a_limit_that_moves_ends_nothing_and_lets_in_as_many_as_it_says(before: int, after: int) -> None:
    async def scenario() -> None:
        episodes, most = Episodes(before), 0

        async def one(n: int) -> None:
            nonlocal most
            async with episodes.place(f"r{n}"):
                if n >= 4:
                    most = max(most, episodes.running)
                await asyncio.sleep(1.0)

        async with asyncio.TaskGroup() as group:
            for n in range(12):
                group.create_task(one(n))
            await asyncio.sleep(0.5)
            assert episodes.running == before
            episodes.limit = after
            assert episodes.running == before
        assert most == after

    run(scenario())


def test_the_tokens_of_every_session_of_an_episode_are_heard() -> None:
    async def scenario() -> None:
        inner = RandomPolicy([5, 6], end=2, end_share=0.0)
        episodes = Episodes(1)
        policy = HeardPolicy(inner, episodes)
        prompt = Array.of([1], "int32")
        async with episodes.place("g1/0"):
            assert episodes.first_version("g1/0") is None
            inner.version = 3
            for session, n in itertools.product(("g1/0", "g1/0~1"), (2, 3)):
                await policy.generate(Generate(session=session, prompt_T=prompt, sampling=Sampling(max_tokens=n)))
                inner.version = 4
            assert episodes.sampled("g1/0") == 10
            assert episodes.first_version("g1/0") == 3
        assert episodes.sampled("g1/0") == 0

    run(scenario())
