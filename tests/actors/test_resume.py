"""A run that is killed and resumed, on the virtual clock: the real actors, books and journal format; a learner whose
weights are the list of what it was trained on, so that a test can read off what went into them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ale.actors.generator import seed_of
from ale.actors.ledger import Ledger
from ale.actors.slots import Slots
from ale.actors.trainer import Update, redo
from ale.algorithm.selection import Outcomes
from ale.data.books import Books
from ale.data.events import Event, Recorded
from ale.data.task_stream import TaskStream
from ale.errors import ConfigError, Interrupted, LearnerError
from ale.messages import Rollout
from ale.testing.clock import run
from ale.testing.fakes import Play

EVERY = 2


class Killed(Exception):
    pass


@dataclasses.dataclass
class Disk:
    """What a kill leaves: the journal, byte for byte, and the last checkpoint."""

    journal: list[bytes] = dataclasses.field(default_factory=list)
    checkpoint: tuple[int, bytes, tuple[str, ...]] | None = None
    """The place in the journal, the books, the learner's weights."""

    def write(self, event: Event) -> None:
        self.journal.append(msgspec.msgpack.encode(event))

    def events(self, start: int) -> list[Event]:
        return [msgspec.msgpack.decode(record, type=Event) for record in self.journal[start:]]

    def books(self) -> tuple[Books, tuple[str, ...]]:
        place, saved, weights = self.checkpoint or (0, msgspec.msgpack.encode(Books()), ())
        books = msgspec.msgpack.decode(saved, type=Books)
        for event in self.events(place):
            books.apply(event)
        return books, weights


class Life:
    """One life of a run: from `disk`, until it is done or `kill_after` more records have been written."""

    def __init__(self, loop: Any, disk: Disk, kill_after: int | None = None, **schedule: Any) -> None:
        self.disk = disk
        self.left = kill_after
        self.tried = loop(**schedule)
        self.books, self.weights = disk.books()
        self.recorded: list[int] = []

    def write(self, event: Event) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1
        self.disk.write(event)

    async def live(self) -> None:
        tried, books = self.tried, self.books
        tried.ledger = Ledger(books, self.write)
        tried.slots = Slots(tried.slots.total, books.groups)
        tried.learner.weights = list(self.weights)
        version = books.updates - len(books.since)
        for trained in books.since:
            tried.policy.version = version
            assert (await redo(tried.learner, trained, tried.config)).version == version + 1
            version += 1
        tried.policy.version = books.updates
        tried.trained_before = books.trained
        tried.learner.steps.clear()
        tried.learner.lags.clear()
        running = {g.drawn: g for g in books.groups.values() if not g.buffered}
        found = tried.tasks.go_to(books.drawn, {drawn: g.task for drawn, g in running.items()})
        tried.under_way = {running[drawn].id: task for drawn, task in found.items()}
        if books.recorded < books.updates:
            await self.after(Update.of(books.since[-1]))
        tried._after = self.after
        await tried.run()

    async def after(self, update: Update) -> None:
        books = self.books
        self.recorded.append(update.number)
        tried_sizes = books.sizes
        self.tried.ledger.book(Recorded(update=update.number, sizes=tried_sizes))
        if update.number % EVERY == 0:
            books.since.clear()
            saved = msgspec.msgpack.encode(books)
            self.disk.checkpoint = (len(self.disk.journal), saved, tuple(self.tried.learner.weights))


def half(rollout: Rollout) -> Play:
    """By the seed alone, as a sampler would: half of them succeed, some fail for other reasons, lengths differ."""
    draw = rollout.sampling.seed >> 10
    status: Any = "sandbox_failure" if draw % 11 == 0 else "scored"
    return Play(reward=float(draw % 2), latency_s=float(draw % 7), tokens=1 + draw % 3, status=status)


def kill_and_resume(loop: Any, kills: list[int], **schedule: Any) -> tuple[Disk, list[Life]]:
    """Lives one after the other, each killed after so many records, and a last one that comes to the end."""
    disk, lives = Disk(), []
    for kill_after in [*kills, None]:
        life = Life(loop, disk, kill_after, **schedule)
        lives.append(life)
        try:
            run(life.live())
            break
        except Killed:
            continue
    return disk, lives


def check(disk: Disk, lives: list[Life], updates: int) -> None:
    books, last = lives[-1].books, lives[-1].tried
    assert books.updates == updates
    events = disk.events(0)
    kept = [e.trajectory.id for e in events if type(e).__name__ == "RolloutKept"]
    dropped = [e.rollout for e in events if type(e).__name__ == "RolloutDropped"]
    started = [e.rollout for e in events if type(e).__name__ == "RolloutStarted"]
    # Nothing is started or ends twice; whatever ended had started.
    for ids in (kept, dropped, started):
        assert len(set(ids)) == len(ids)
    assert not set(kept) & set(dropped)
    assert set(kept) | set(dropped) <= set(started)
    # Every task is rolled out once, in the order of the stream.
    drawn = [e.drawn for e in events if type(e).__name__ == "GroupOpened"]
    assert drawn == list(range(1, len(drawn) + 1))
    # Nothing went into the weights twice, and what went into them is what the books say.
    assert max(Counter(last.learner.weights).values(), default=1) == 1
    assert len(last.learner.weights) == books.trained
    refused = {id_ for e in events if type(e).__name__ == "Updated" for id_ in e.metrics.dropped}
    # Nothing that had finished is lost: it is trained on, waits in a group, or was dropped with a reason.
    ended = {e.group for e in events if type(e).__name__ == "GroupDropped"}
    waiting = {t.id for g in books.groups.values() for t in g.members}
    assert {id_ for id_ in kept if id_.split("/")[0] not in ended} == waiting | refused | set(last.learner.weights)
    statistics = last.ledger.at_the_end()
    assert statistics.lost == 0
    assert statistics.started == len(started)
    # The lines of every update are written at least once, and the journal counts each once.
    assert [e.update for e in events if type(e).__name__ == "Recorded"] == list(range(1, updates + 1))


SCHEDULE: dict[str, Any] = {
    "script": half,
    "group_size": 2,
    "groups_per_step": 2,
    "updates": 5,
    "latency_s": lambda n: 2.0,
    "load_s": 1.0,
}


@pytest.fixture(scope="module")
def length(loop: Any) -> int:
    """Records in the journal of a run that is left alone."""
    disk, lives = kill_and_resume(loop, [], **SCHEDULE)
    check(disk, lives, 5)
    return len(disk.journal)


def test_a_kill_after_any_record_loses_nothing_and_trains_on_nothing_twice(loop: Any, length: int) -> None:
    for kill in range(length):
        disk, lives = kill_and_resume(loop, [kill], **SCHEDULE)
        assert len(lives) == 2
        check(disk, lives, 5)


def test_a_kill_after_any_record_of_a_run_with_extras_drops_each_redundant_rollout_once(loop: Any) -> None:
    schedule = SCHEDULE | {"extra_members": 2, "extra_groups": 2, "max_lag": 0, "updates": 3}
    disk, lives = kill_and_resume(loop, [], **schedule)
    check(disk, lives, 3)
    assert lives[-1].books.dropped["redundant"] > 3 * 2 * 2
    for kill in range(0, len(disk.journal), 5):
        again, lives = kill_and_resume(loop, [kill], **schedule)
        check(again, lives, 3)


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    on_stale, refused = draw(st.sampled_from(["discard", "wait"])), draw(st.booleans())
    return SCHEDULE | {
        "max_lag": draw(st.integers(0, 2)),
        "extra_members": draw(st.sampled_from([0, 2])),
        "extra_groups": draw(st.sampled_from([0, 2])) if on_stale == "discard" else 0,
        "straggler_s": draw(st.sampled_from([None, 4.0])),
        "on_stale": on_stale,
        "shuffle_rewards": draw(st.booleans()),
        "drop": lambda t: "bad_logprob" if refused and ord(t.id[-1]) % 2 else None,
    }


KILLS = st.lists(st.integers(0, 25), max_size=20)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kills=KILLS, schedule=schedules())
def test_twenty_kills_at_any_records_lose_nothing(loop: Any, kills: list[int], schedule: dict[str, Any]) -> None:
    hold(loop, kills, schedule)


@pytest.mark.full
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kills=KILLS, schedule=schedules())
def test_twenty_kills_of_two_hundred_schedules_lose_nothing(
    loop: Any, kills: list[int], schedule: dict[str, Any]
) -> None:
    hold(loop, kills, schedule)


def hold(loop: Any, kills: list[int], schedule: dict[str, Any]) -> None:
    disk, lives = kill_and_resume(loop, kills, **schedule)
    check(disk, lives, 5)
    assert all(0 <= lag <= schedule["max_lag"] for life in lives for lag in life.tried.learner.lags)


@pytest.mark.parametrize("selection", ["unsolved", "moderate"])
def test_a_resumed_run_goes_on_choosing_tasks_by_what_it_has_seen(loop: Any, selection: Any) -> None:
    def script(rollout: Rollout) -> Play:
        solved = rollout.task.family == "odd" or rollout.sampling.seed >> 10 & 1
        return Play(reward=float(solved), latency_s=1.0)

    schedule = SCHEDULE | {"script": script, "selection": selection, "baseline": "none", "updates": 12}
    disk, lives = kill_and_resume(loop, [40, 30], **schedule)
    assert len(lives) == 3
    opened = [e for e in disk.events(0) if type(e).__name__ == "GroupOpened"]
    drawn = [e.drawn for e in opened]
    assert drawn == sorted(set(drawn))  # none twice, in the order of the stream
    assert drawn[-1] > 1.3 * len(drawn)  # many were passed over
    odd = [int(e.task[1:]) % 2 for e in opened]
    assert sum(odd[len(odd) // 2 :]) / len(odd[len(odd) // 2 :]) < 0.35  # those that are always solved, most of them
    books, outcomes = lives[-1].books, {}
    for event in disk.events(0):
        if type(event).__name__ == "RolloutKept":
            kind = f"{event.trajectory.family}/{event.trajectory.level}"
            outcomes[kind] = outcomes.get(kind, Outcomes()).after(event.solved)
    assert books.outcomes == outcomes


def test_a_stop_while_a_batch_is_awaited_is_heard_at_once_and_drops_nothing(loop: Any) -> None:
    disk = Disk()
    life = Life(loop, disk, **SCHEDULE | {"script": lambda rollout: Play(reward=1.0, latency_s=500.0)})

    async def scenario() -> None:
        clock = asyncio.get_running_loop()
        clock.call_later(3.0, life.tried.stop.request)
        with pytest.raises(Interrupted):
            await life.live()

    run(scenario())
    assert life.tried.ledger.statistics().dropped == {}
    assert life.tried.ledger.statistics().running == 8
    again = Life(loop, disk, **SCHEDULE)
    run(again.live())
    check(disk, [life, again], 5)


def test_a_stop_during_an_update_waits_for_that_update(loop: Any) -> None:
    disk = Disk()
    life = Life(loop, disk, **SCHEDULE | {"latency_s": lambda n: 1000.0})

    async def scenario() -> None:
        clock = asyncio.get_running_loop()
        clock.call_later(900.0, life.tried.stop.request)
        with pytest.raises(Interrupted):
            await life.live()
        assert clock.time() > 1000.0

    run(scenario())
    assert life.books.updates == life.books.recorded == 1
    again = Life(loop, disk, **SCHEDULE)
    run(again.live())
    check(disk, [life, again], 5)


def test_a_rollout_that_was_cut_off_runs_again_under_its_name_and_seed(loop: Any, length: int) -> None:
    disk, lives = kill_and_resume(loop, [length // 2], **SCHEDULE)
    first, second = (life.tried.envs.received for life in lives)
    again = {r.id: r for r in first if r.id in {s.id for s in second}}
    assert again
    for rollout in second:
        if rollout.id in again:
            assert rollout.sampling.seed == again[rollout.id].sampling.seed == seed_of(rollout.id, 0)
            assert rollout.task == again[rollout.id].task
    assert disk


def test_the_seeds_of_rollouts_leave_room_for_their_turns() -> None:
    seeds = sorted(seed_of(f"g{g}/{m}", seed) for g in range(200) for m in range(8) for seed in (0, 1))
    assert min(b - a for a, b in itertools.pairwise(seeds)) >= 1024
    assert 0 <= seeds[0] < seeds[-1] < 1 << 63


def test_tasks_that_have_changed_are_refused_by_name(with_tasks: Any) -> None:
    stream = TaskStream(iter(with_tasks(5)))
    with pytest.raises(ConfigError, match="was rolling out t9 as task number 3, which is t2 now"):
        stream.go_to(4, {3: "t9"})
    with pytest.raises(ConfigError, match="had taken 7 tasks from it, but there are 5 now"):
        TaskStream(iter(with_tasks(5))).go_to(7, {})


def test_an_update_made_again_that_comes_to_another_version_is_an_error(loop: Any) -> None:
    disk, lives = kill_and_resume(loop, [], **SCHEDULE)
    trained = lives[-1].books.since[-1]
    tried = loop(**SCHEDULE)
    with pytest.raises(LearnerError, match="update 5 made version 5 and makes version 1 again"):
        run(redo(tried.learner, trained, tried.config))
    assert disk
