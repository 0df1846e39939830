"""The asynchronous loop: nothing is lost, nothing is too old, and the run ends for a reason."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ale.actors.reward_shuffle import exchange
from ale.errors import ActorError, ConfigError, DeadlineExceeded, LearnerError, first_error
from ale.messages import EndSession, GroupEnded, Rollout
from ale.testing.clock import run
from ale.testing.fakes import Play

INFRASTRUCTURE = ("sandbox_failure", "policy_failure", "evaluator_error", "episode_timeout", "illegal_tool_calls")


def member(rollout: Rollout) -> int:
    return int(rollout.id.split("/")[1])


plays = st.builds(
    Play,
    reward=st.sampled_from([0.0, 1.0, 0.5]),
    latency_s=st.sampled_from([0.0, 1.0, 2.5, 7.0, 30.0, 90.0]),
    tokens=st.integers(1, 4),
    status=st.sampled_from(["scored"] * 8 + list(INFRASTRUCTURE)),
)


@st.composite
def schedules(draw):
    group_size = draw(st.integers(1, 4))
    baselines = ["none", "signed"] + (["group_mean", "group_norm", "leave_one_out"] if group_size > 1 else [])
    script = draw(st.lists(plays, min_size=1, max_size=40))
    steps = draw(st.lists(st.sampled_from([0.0, 0.5, 3.0, 20.0, 100.0]), min_size=1, max_size=6))
    refused = draw(st.sampled_from([0, 0, 3, 5]))
    seen = iter(range(10**9))
    unlucky = iter(range(10**9))
    on_stale = draw(st.sampled_from(["discard", "wait"]))
    return {
        "script": lambda rollout: script[next(seen) % len(script)],
        "group_size": group_size,
        "groups_per_step": draw(st.integers(1, 3)),
        "max_lag": draw(st.integers(0, 3)),
        "on_stale": on_stale,
        "updates": draw(st.integers(1, 6)),
        "baseline": draw(st.sampled_from(baselines)),
        "task_count": draw(st.integers(1, 40)),
        "load_s": draw(st.sampled_from([0.0, 1.0, 10.0])),
        "concurrency": draw(st.sampled_from([1, 3, 64])),
        "extra_members": draw(st.sampled_from([0, 0, 1, 3])),
        "extra_groups": 0 if on_stale == "wait" else draw(st.sampled_from([0, 0, 1, 4])),
        "straggler_s": draw(st.sampled_from([None, None, 5.0, 60.0])),
        "straggler_factor": draw(st.sampled_from([None, 3.0])),
        "latency_s": lambda update: steps[update % len(steps)],
        "drop": lambda t: "bad_logprob" if refused and next(unlucky) % refused == 0 else None,
    }


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedule=schedules())
def test_no_trained_token_is_older_than_max_lag_and_nothing_is_lost(loop, schedule):
    hold(loop, schedule)


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(schedule=schedules())
@seed(20251224)
def test_ten_thousand_schedules_hold_the_bound_and_lose_nothing(loop, schedule):
    hold(loop, schedule)


def hold(loop, schedule):
    async def scenario():
        tried = loop(**schedule)
        try:
            await tried.run()
            ended = None
        except ConfigError as error:
            ended = error
        return tried, ended

    tried, ended = run(scenario())
    books, slots = tried.ledger.statistics(), tried.slots.taken
    c = tried.config.rollout
    assert all(0 <= lag <= c.max_lag for lag in tried.learner.lags)
    assert [u.lag for u in tried.updates] == tried.learner.lags
    assert all(len(step.samples) == c.groups_per_step * c.group_size for step in tried.learner.steps)
    ids = [s.trajectory.id for step in tried.learner.steps for s in step.samples]
    assert len(set(ids)) == len(ids)
    assert books.trained == len(ids) - sum(len(u.metrics.dropped) for u in tried.updates)
    # What nobody waits for has ended, and its place is free.
    assert tried.episodes.running == tried.episodes.waiting == tried.envs.running == 0
    # A slot belongs to a group that the buffer knows, running or finished; no slot to anything else.
    assert slots == len(tried.buffer._groups)
    if c.on_stale == "wait":
        assert "stale" not in books.dropped
    if ended is None:
        assert len(tried.updates) == tried.config.learner.updates
        assert tried.ledger.at_the_end().lost == 0
    else:
        assert "The tasks ended after" in str(ended)
        # Every group has come to its end: what still holds a slot is a group in the buffer, and nothing else is.
        assert books.running == 0
        assert books.buffered == slots * c.group_size
        assert slots < c.groups_per_step


def test_the_books_close_at_the_end_and_every_reason_is_counted(loop):
    def script(rollout: Rollout) -> Play:
        number = int(rollout.task.id[1:])
        if number % 3 == 1:
            return Play(reward=1.0, latency_s=1.0)  # a group without a gradient
        if number % 3 == 2 and member(rollout) == 0:
            return Play(status="sandbox_failure", latency_s=0.5)
        return Play(reward=float(member(rollout) % 2), latency_s=2.0)

    done = run(loop(script, updates=5, latency_s=lambda n: 3.0).run())
    books = done.ledger.at_the_end()
    assert books.trained == 5 * 2 * 2
    assert books.running == 0
    assert set(books.dropped) == {"zero_advantage", "sandbox_failure", "end_of_run"}
    assert books.lost == 0
    assert books.dropped_tokens["zero_advantage"] == 2.0


@pytest.mark.parametrize(("selection", "least", "most"), [("all", 0.45, 0.55), ("unsolved", 0.7, 0.9)])
def test_rollouts_go_to_the_kind_of_task_that_is_not_solved_yet(loop, selection, least, most):
    def script(rollout: Rollout) -> Play:
        solved = rollout.task.family == "even" or member(rollout) == 0
        return Play(reward=float(solved), latency_s=1.0)

    done = run(loop(script, selection=selection, baseline="none", updates=60, concurrency=4).run())
    families = [rollout.task.family for rollout in done.envs.received]
    assert least < families.count("odd") / len(families) < most
    # every rollout of an even task solves it, so one in ten is taken; every second one of an odd task: five in ten
    groups_and_tasks = {(rollout.group, rollout.task.id) for rollout in done.envs.received}
    assert len({task for _, task in groups_and_tasks}) == len(groups_and_tasks)


def test_what_is_late_is_dropped_as_stale_and_its_slot_goes_to_another(loop):
    def script(rollout: Rollout) -> Play:
        slow = rollout.group == "g1"
        return Play(reward=float(member(rollout)), latency_s=50.0 if slow else 1.0, tokens=100 if slow else 2)

    done = run(loop(script, groups_per_step=1, max_lag=1, updates=80, task_count=81, latency_s=lambda n: 1.0).run())
    books = done.ledger.statistics()
    assert books.dropped["stale"] == 2
    # Ended as soon as a batch was taken without it: counted with what it had sampled until then.
    assert sorted(done.envs.cancelled) == ["g1/0", "g1/1"]
    assert 4 <= books.dropped_tokens["stale"] <= 8
    assert "g1" not in {s.trajectory.group for step in done.samples() for s in step.samples}
    assert books.trained == 160
    assert done.slots.taken == 0


def test_waiting_in_order_trains_on_what_discarding_would_drop(loop):
    def script(rollout: Rollout) -> Play:
        return Play(reward=float(member(rollout)), latency_s=50.0 if rollout.group == "g1" else 1.0)

    done = run(loop(script, groups_per_step=1, max_lag=1, updates=8, on_stale="wait").run())
    groups = [step.samples[0].trajectory.group for step in done.samples()]
    assert groups == [f"g{n}" for n in range(1, 9)]
    assert max(done.learner.lags) == 1
    assert "stale" not in done.dropped()


def test_without_lag_no_rollout_starts_while_an_update_is_pending(loop):
    def script(rollout: Rollout) -> Play:
        started_while_pending.append(done.pending)
        return Play(reward=float(member(rollout)), latency_s=1.0)

    started_while_pending: list[bool] = []
    done = loop(script, max_lag=0, updates=4, latency_s=lambda n: 10.0, load_s=2.0)
    run(done.run())
    # The groups that follow the last update may have started too.
    assert len(started_while_pending) >= 4 * 2 * 2
    assert not any(started_while_pending)
    assert done.learner.lags == [0] * 4


def test_with_lag_rollouts_go_on_while_an_update_is_pending(loop):
    def script(rollout: Rollout) -> Play:
        started_while_pending.append(done.pending)
        return Play(reward=float(member(rollout)), latency_s=4.0 if rollout.group == "g4" else 1.0)

    started_while_pending: list[bool] = []
    # A group without a gradient gives its slot back at once, so its successor starts under the update.
    done = loop(
        lambda r: script(r) if r.group != "g3" else Play(reward=1.0, latency_s=2.0),
        updates=3,
        latency_s=lambda n: 10.0,
    )
    run(done.run())
    assert any(started_while_pending)


def test_the_end_of_the_tasks_is_an_error_when_the_trainer_wants_more(loop):
    done = loop(task_count=5, groups_per_step=2, updates=9)
    with pytest.raises(ConfigError, match=r"ended after 5 groups: 2 are needed to train version 2 on and 1 are left"):
        run(done.run())
    assert len(done.updates) == 2
    assert done.slots.taken == 1


def test_the_end_of_the_tasks_is_no_error_when_the_trainer_has_enough(loop):
    done = run(loop(task_count=4, groups_per_step=2, updates=2).run())
    assert done.ledger.statistics().trained == 8
    assert done.slots.taken == 0


@pytest.mark.parametrize("status", INFRASTRUCTURE)
def test_a_failed_rollout_is_replaced_at_once(loop, status):
    def script(rollout: Rollout) -> Play:
        if rollout.id == "g1/0":
            return Play(status=status, reward=None, latency_s=1.0)
        return Play(reward=float(member(rollout) % 2), latency_s=3.0)

    async def until_replaced(tried):
        await asyncio.sleep(1.5)
        assert [r.id for r in tried.envs.received if r.group == "g1"] == ["g1/0", "g1/1", "g1/2"]

    done = loop(script, group_size=2, groups_per_step=1, max_lag=0)
    run(done.run(until_replaced))
    assert done.dropped() == {status: 1, "end_of_run": 2}


def test_a_task_that_keeps_failing_gives_its_slot_back(loop, caplog):
    def script(rollout: Rollout) -> Play:
        if rollout.task.id == "t0":
            return Play(status="evaluator_error", reward=None) if member(rollout) else Play(reward=1.0)
        return Play(reward=float(member(rollout)), latency_s=1.0)

    done = run(loop(script, group_size=2, groups_per_step=1, max_lag=0, updates=2, task_count=3).run())
    assert done.dropped() == {"evaluator_error": 5, "group_too_small": 1}
    assert "group g1: task t0 keeps failing and is given up: 5 evaluator_error" in caplog.text
    assert done.slots.taken == 0
    assert done.ledger.statistics().trained == 4


@pytest.mark.parametrize(("reward", "count"), [(0.0, 4), (1.0, 4), (0.3, 4)])
def test_a_group_with_equal_rewards_is_dropped_with_the_reason(loop, reward, count):
    def script(rollout: Rollout) -> Play:
        return Play(reward=reward if rollout.group == "g1" else float(member(rollout) % 2))

    done = run(loop(script, group_size=count, groups_per_step=1, max_lag=0, updates=1, task_count=2).run())
    assert done.dropped() == {"zero_advantage": count}
    assert {s.trajectory.group for s in done.samples()[0].samples} == {"g2"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Play(reward=None), "reward_not_finite"),
        (Play(reward=float("nan")), "reward_not_finite"),
        (Play(reward=1.0, logp=float("nan")), "logp_not_finite"),
        (Play(reward=1.0, logp=float("-inf")), "logp_not_finite"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_and_the_run_goes_on(loop, bad, reason):
    def script(rollout: Rollout) -> Play:
        return bad if rollout.id == "g1/0" else Play(reward=float(member(rollout) % 2))

    done = run(loop(script, groups_per_step=1, max_lag=0, updates=2, task_count=3).run())
    assert done.dropped()[reason] == 1
    assert "g1/0" not in {s.trajectory.id for step in done.samples() for s in step.samples}
    assert len(done.updates) == 2


def test_what_the_learner_refuses_is_dropped_not_trained(loop):
    done = run(
        loop(updates=2, drop=lambda t: "bad_logprob" if t.id.endswith("/1") else None, task_count=4, max_lag=0).run()
    )
    books = done.ledger.statistics()
    assert (books.trained, books.dropped) == (4, {"bad_logprob": 4})


def test_shuffled_rewards_are_earlier_rewards_of_other_rollouts() -> None:
    pool: list[float] = []
    given = []
    for number in range(1000):
        put, reward = exchange(pool, number, 0, float(number))
        pool[put.place : put.place + 1] = [put.earned]
        given.append(reward)
    kept = [reward for reward in given if reward is not None]
    assert given[:64] == [None] * 64
    assert len(kept) == len(set(kept)) == 1000 - 64  # each is handed on once
    assert all(reward < number for number, reward in enumerate(given) if reward is not None)


def test_with_shuffled_rewards_the_books_still_add_up(loop):
    done = run(loop(lambda r: Play(reward=float(member(r))), updates=3, shuffle_rewards=True, baseline="none").run())
    books = done.ledger.statistics()
    assert books.lost == 0
    assert books.dropped["shuffle_pool"] == 64


def test_advantages_are_taken_within_the_group(loop):
    done = run(loop(updates=1).run())
    assert [s.advantage for s in done.samples()[0].samples] == [-0.5, 0.5, -0.5, 0.5]


# Crashes: each stops the run, with its own cause


def test_a_bug_in_an_episode_stops_the_run_as_it_was(loop):
    bug = ZeroDivisionError("a bug in the episode")
    done = loop(lambda r: Play(latency_s=1.0, error=bug) if r.id == "g2/0" else Play(latency_s=5.0))
    with pytest.raises(ZeroDivisionError, match="a bug in the episode") as raised:
        run(done.run())
    assert "in actor 'generator'" in raised.value.__notes__


def test_a_crash_of_the_environment_manager_stops_the_run_with_its_cause(loop):
    async def crash(tried):
        await asyncio.sleep(0.5)
        # Told, not asked: nobody else would hear of the error.
        await tried.bus.tell("envs", EndSession(session="x"), deadline_s=1)
        await asyncio.sleep(3600)

    done = loop(lambda r: Play(latency_s=50.0))
    with pytest.raises(ActorError, match="'envs' does not understand EndSession"):
        run(done.run(crash))
    done.check()


def test_a_crash_of_the_generator_stops_the_run_with_its_cause(loop):
    def broken():
        yield from ()
        raise OSError("the task directory went away")

    done = loop()
    done.tasks = broken()
    with pytest.raises(OSError, match="the task directory went away") as raised:
        run(done.run())
    assert "in actor 'generator'" in raised.value.__notes__


def test_a_crash_of_the_buffer_stops_the_run_with_its_cause(loop):
    async def crash(tried):
        await asyncio.sleep(0.5)
        await tried.bus.tell("buffer", GroupEnded(group="never started", reason="none"), deadline_s=1)
        await asyncio.sleep(3600)

    done = loop(lambda r: Play(latency_s=50.0))
    with pytest.raises(KeyError, match="never started") as raised:
        run(done.run(crash))
    assert "in actor 'buffer'" in raised.value.__notes__


def test_a_failing_update_stops_the_run_with_its_cause(loop):
    done = loop(error=lambda update: LearnerError("out of memory") if update == 2 else None, updates=4)
    with pytest.raises(LearnerError, match="out of memory") as raised:
        run(done.run())
    assert "in actor 'trainer'" in raised.value.__notes__
    assert len(done.updates) == 1
    done.check()


def test_a_failing_record_of_an_update_stops_the_run_with_its_cause(loop):
    async def full(update):
        raise OSError("no space left")

    done = loop()
    done._after = full
    with pytest.raises(OSError, match="no space left"):
        run(done.run())


def test_a_run_stopped_amid_its_rollouts_books_them_as_dropped(loop):
    async def leave(tried):
        await asyncio.sleep(2.0)
        assert tried.ledger.statistics().running == 8

    done = run(loop(lambda r: Play(latency_s=5.0)).run(leave))
    books = done.ledger.at_the_end()
    assert books.dropped == {"end_of_run": 8}
    assert (books.started, books.running, books.buffered, books.trained) == (8, 0, 0, 0)


def test_a_run_cancelled_from_outside_ends_with_its_rollouts(loop):
    async def scenario():
        done = loop(lambda r: Play(latency_s=50.0))
        running = asyncio.create_task(done.run())
        await asyncio.sleep(1.0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert done.envs.running == 0
        assert len(asyncio.all_tasks()) == 1

    run(scenario())


def test_a_run_that_is_stopped_while_a_batch_is_awaited_ends_at_once(loop):
    async def scenario():
        clock = asyncio.get_running_loop()

        async def leave(tried):
            await asyncio.sleep(2.0)
            nonlocal left
            left = clock.time()

        left = 0.0
        # The episodes of the environment manager last 5 s; the buffer must add nothing to that.
        await loop(lambda r: Play(latency_s=5.0)).run(leave)
        return clock.time() - left

    assert run(scenario()) <= 3.0


def test_no_batch_in_time_is_an_error_that_names_the_wait(loop):
    with pytest.raises(DeadlineExceeded, match="trainer/run waits for the answer of actor 'buffer' to TakeBatch"):
        run(loop(lambda r: Play(reward=1.0, latency_s=1.0), batch_deadline_s=30.0).run())


def test_a_learner_that_is_late_stops_the_run(loop):
    async def scenario():
        done = loop(updates=1, latency_s=lambda n: 10_000.0, step_deadline_s=600.0)
        with pytest.raises(TimeoutError):
            await done.run()

    run(scenario())


def test_the_first_error_is_found_in_nested_groups():
    first = ValueError("first")
    assert first_error(ExceptionGroup("a", [ExceptionGroup("b", [first, OSError()]), KeyError()])) is first
