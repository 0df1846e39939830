"""A run that is recorded and played again, on the virtual clock: the real actors, journal and recording."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ale.actors.env_manager import EnvManager
from ale.actors.episodes import Episodes
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots
from ale.actors.taped import TapedPolicy
from ale.actors.trainer import Trainer, Update
from ale.bus import Bus
from ale.config import RunConfig
from ale.data.books import Books, LedgerStatistics
from ale.data.events import Began, Event, GroupBuffered, GroupDropped, Resumed, Updated
from ale.data.journal import FORMAT, Journal, read_journal
from ale.data.recording import Answer, Entry, Life, Recording, read_recording
from ale.data.script import Script
from ale.data.task_stream import TaskStream
from ale.errors import Diverged, RunFolderError
from ale.messages import Rollout, Trajectory
from ale.replay import Part, parts, replay_life, replay_lives
from ale.supervisor import Supervisor
from ale.testing.clock import run
from ale.testing.fakes import FakeLearner, FakePolicy, Play, ScriptedEnvs
from ale.wire import Array


class Killed(Exception):
    pass


class Weights(FakeLearner):
    """A learner whose loss tells all that it was ever trained on, in which order."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.sum = 0

    async def ask(self, request: Any, *, deadline_s: float) -> Any:
        metrics = await super().ask(request, deadline_s=deadline_s)
        for sample in request.samples:
            seen = f"{sample.trajectory.id} {sample.advantage}".encode() + sample.trajectory.tokens_T.data
            self.sum = zlib.crc32(seen, self.sum)
        return msgspec.structs.replace(metrics, loss=self.sum / 2**32)


class Folder:
    """A run on disk, recorded; its lives one after the other."""

    def __init__(self, path: Path, loop: Any, **schedule: Any) -> None:
        self.path, self.loop, self.schedule = path, loop, schedule
        self.books = Books()
        self.weights = 0
        self.config: RunConfig = loop(**schedule).config

    def live(self, kill_after: int | None = None) -> None:
        run(self._live(kill_after))

    async def _live(self, kill_after: int | None) -> None:
        tried, books = self.loop(**self.schedule), self.books
        journal, recording = Journal(self.path / "journal"), Recording(self.path / "recording")
        if not journal.size:
            journal.write(Began(format=FORMAT, ale="0"))
        else:
            resumed = Resumed(format=FORMAT)
            journal.write(resumed)
            books.apply(resumed)
        left = kill_after

        def write(event: Event) -> None:
            nonlocal left
            if left is not None:
                if left == 0:
                    raise Killed
                left -= 1
            journal.write(event)
            if isinstance(event, Updated):
                self.weights = learner.sum

        ledger = Ledger(books, write)
        bus = Bus(tape=recording)
        inner = FakePolicy(load_s=1.0)
        inner.version = books.updates
        policy = TapedPolicy(inner, recording)
        learner = Weights(inner, latency_s=lambda update: 2.0)
        learner.sum = self.weights  # what comes of a checkpoint, and of the updates since made again
        envs = ScriptedEnvs(self.schedule["script"], policy)  # type: ignore[arg-type]
        tasks = TaskStream(tried.tasks, recording.task)
        running = {group.drawn: group for group in books.groups.values() if not group.buffered}
        found = tasks.go_to(books.drawn, {drawn: group.task for drawn, group in running.items()})
        slots = Slots(tried.slots.total, books.groups)
        rollout = tried.config.rollout
        recording.begin(
            Life(number=books.lives, journal=journal.size, version=policy.version),
            [name for group in running.values() for name in group.running],
        )

        async def play(rollout: Rollout) -> Trajectory:
            return await envs._play(rollout, self.schedule["script"](rollout))

        async def after(update: Update) -> None:
            books.since.clear()

        none: Any = None
        episodes = Episodes(rollout.concurrency)
        manager = EnvManager(
            policy, none, none, tried.config.agent, episodes, concurrency=rollout.concurrency, play=play
        )
        try:
            async with Supervisor(bus) as outer:
                await outer.start(manager)
                async with Supervisor(bus) as actors:
                    buffer = SampleBuffer(slots, ledger, max_lag=rollout.max_lag, on_stale=rollout.on_stale)
                    under_way = {running[drawn].id: task for drawn, task in found.items()}
                    generator = Generator(tried.config, tasks, slots, ledger, episodes, under_way)
                    trainer = Trainer(tried.config, learner, policy, slots, ledger, after, tried.stop)
                    for actor in (buffer, generator, trainer):
                        await actors.start(actor)
                    await actors.join(trainer)
        finally:
            journal.close()
            recording.close()

    def events(self) -> list[Event]:
        return list(read_journal(self.path / "journal"))

    def parts(self) -> list[Part]:
        found = parts(lambda: read_recording(self.path / "recording"))
        return [msgspec.structs.replace(part, entries=list(part.entries)) for part in found]

    def replay(self, change: Callable[[list[Entry]], list[Entry]] = lambda entries: entries) -> Script:
        async def played() -> Script:
            script, books = Script(self.events), Books()
            learner = Weights(FakePolicy())
            changed = [msgspec.structs.replace(part, entries=change(list(part.entries))) for part in self.parts()]
            async for _ in replay_lives(self.config, changed, books, script, Versions(learner)):
                pass
            script.catch_up(books)
            script.check_through()
            return script

        return run(played())


class Versions:
    """A `Weights` beside which no policy loads what it makes: it counts its versions itself."""

    def __init__(self, learner: Weights) -> None:
        self.learner = learner

    async def ask(self, request: Any, *, deadline_s: float) -> Any:
        metrics = await self.learner.ask(request, deadline_s=deadline_s)
        self.learner._policy.version = metrics.version
        return metrics


def drawn(rollout: Rollout) -> Play:
    """By the seed alone: rewards, lengths, failures, and latencies with a long tail."""
    rng = random.Random(rollout.sampling.seed)
    status: Any = "sandbox_failure" if rng.random() < 0.1 else "scored"
    latency_s = float(rng.randrange(1, 5)) * (8 if rng.random() < 0.1 else 1)
    return Play(reward=float(rng.random() < 0.5), latency_s=latency_s, tokens=rng.randrange(1, 5), status=status)


SCHEDULE: dict[str, Any] = {"script": drawn, "group_size": 3, "groups_per_step": 2, "updates": 6}


@pytest.mark.parametrize("on_stale", ["discard", "wait"])
@pytest.mark.parametrize("max_lag", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_recorded_run_replays_to_the_same_batches_in_the_same_order_and_losses(
    tmp_path: Path, loop: Any, max_lag: int, on_stale: str, shuffle: bool
) -> None:
    folder = Folder(tmp_path, loop, **SCHEDULE, max_lag=max_lag, on_stale=on_stale, shuffle_rewards=shuffle)
    folder.live()
    script = folder.replay()
    assert script.diverged is None
    assert (script.updates, script.loss_apart) == (6, 0.0)
    ended = [e for e in folder.events() if type(e).__name__ in ("RolloutKept", "RolloutDropped")]
    assert script.rollouts == len(ended)


def test_a_run_that_was_killed_and_resumed_replays_life_after_life(tmp_path: Path, loop: Any) -> None:
    for number, kills in enumerate([(5,), (17, 1), (30, 11), (0, 0, 44), *((n, n) for n in range(20, 50, 3))]):
        path = tmp_path / str(number)
        path.mkdir()
        folder = Folder(path, loop, **SCHEDULE)
        for kill in kills:
            with pytest.raises(Killed):
                folder.live(kill)
        folder.live()
        script = folder.replay()
        assert (script.diverged, script.updates, script.loss_apart) == (None, 6, 0.0), kills
        assert folder.books.lives == len(folder.parts()) == len(kills) + 1
        assert folder.books.restarted > 0 or kills != (5,)


def test_the_first_difference_is_named(tmp_path: Path, loop: Any) -> None:
    folder = Folder(tmp_path, loop, **SCHEDULE)
    folder.live()
    kept = next(e.trajectory for e in folder.events() if type(e).__name__ == "RolloutKept")

    def other_token(entries: list[Entry]) -> list[Entry]:
        changed = list(entries)
        for n, entry in enumerate(entries):
            if (entry.kind, entry.name) == ("play", kept.id):
                assert isinstance(entry.answer, Answer)
                t = msgspec.msgpack.decode(entry.answer.value, type=Trajectory)
                tokens = t.tokens_T.numpy().copy()
                tokens[-1] += 7
                t = msgspec.structs.replace(t, tokens_T=Array.of(tokens))
                changed[n] = Entry(entry.kind, entry.name, Answer(msgspec.Raw(msgspec.msgpack.encode(t))))
        return changed

    with pytest.raises(Diverged, match=rf"RolloutKept {kept.id}: trajectory\.tokens_T\[\d+\]: \d+, and \d+"):
        folder.replay(other_token)


def test_a_replay_that_cannot_go_on_says_what_it_waits_for(tmp_path: Path, loop: Any) -> None:
    folder = Folder(tmp_path, loop, **SCHEDULE)
    folder.live()

    def without_an_answer(entries: list[Entry]) -> list[Entry]:
        gone = next(n for n, entry in enumerate(entries) if entry.kind == "play")
        return [*entries[:gone], *entries[gone + 1 :]]

    with pytest.raises(Diverged, match=r"goes on with: end g\d+/\d+. The replay does not get there; .*play g\d+/\d+"):
        folder.replay(without_an_answer)


class Observed(Script):
    """Lets the run go as it goes, and keeps what was booked."""

    def __init__(self) -> None:
        super().__init__(list)
        self.seen: list[Event] = []

    def makes(self, update: int, life: int) -> bool:
        return True

    def write(self, event: Event) -> None:
        self.seen.append(event)


def at_once(rollout: Rollout) -> Play:
    """Every rollout ends in the same turn of the loop; groups with an odd number have nothing to learn from."""
    group, member = rollout.id.split("/")
    return Play(reward=float(int(member) % 2 if int(group[1:]) % 2 == 0 else 1), latency_s=3.0)


@pytest.mark.parametrize("order", [("g1", "g2"), ("g2", "g1")])
def test_two_groups_that_end_in_one_turn_of_the_loop_may_come_in_either_order(
    tmp_path: Path, loop: Any, order: tuple[str, str]
) -> None:
    """g1 is dropped and its slot goes to another group; g2 is buffered. Which comes first is a race, pinned here both
    ways: the books add up, and the batch is the same."""
    folder = Folder(tmp_path, loop, script=at_once, group_size=2, groups_per_step=2, max_lag=0, updates=1)
    folder.live()

    def first(entries: list[Entry]) -> list[Entry]:
        ends = ("redundant", "group")
        places = [n for n, entry in enumerate(entries) if entry.kind in ends and entry.name in order]
        after = [n for n, entry in enumerate(entries) if entry.kind == "heard" and entry.name.split()[-1] in order]
        told = [n for n in after if "GroupStarted" not in entries[n].name]
        assert places[-1] - places[0] == 3, "they are not passed in one turn of the loop"
        changed = list(entries)
        for where, entry in zip(places, [Entry(kind, group) for group in order for kind in ends], strict=True):
            changed[where] = entry
        by_group = {entries[n].name.split()[-1]: entries[n] for n in told}
        for where, group in zip(told, order, strict=True):
            changed[where] = by_group[group]
        return changed

    async def played() -> tuple[Observed, Books]:
        script, books, learner = Observed(), Books(), Weights(FakePolicy())
        (part,) = folder.parts()
        changed = msgspec.structs.replace(part, entries=first(list(part.entries)))
        await replay_life(folder.config, changed, books, script, Versions(learner))
        return script, books

    script, books = run(played())
    moved = [e.group for e in script.seen if isinstance(e, GroupBuffered | GroupDropped)]
    assert tuple(moved[:2]) == order
    assert [e.groups for e in script.seen if isinstance(e, Updated)] == [("g2", "g4")]
    assert LedgerStatistics.of(books).lost == 0


def test_a_recording_that_was_cut_off_anywhere_keeps_its_whole_entries(tmp_path: Path, loop: Any) -> None:
    folder = Folder(tmp_path, loop, **SCHEDULE | {"updates": 1})
    folder.live()
    path = tmp_path / "recording"
    whole, entries = path.read_bytes(), list(read_recording(path))
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        cut = list(read_recording(path))
        assert cut == entries[: len(cut)]
        Recording(path).close()
        assert list(read_recording(path)) == cut


def test_a_recording_keeps_nothing_of_rollouts_that_were_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        recording = Recording(tmp_path / "recording")
        recording.begin(Life(number=1, journal=0, version=0), ["g1/0"])
        await recording.reach("start", "g1/1")
        asking = [
            asyncio.create_task(recording.answer("turn", name, asyncio.Event().wait, bool)) for name in ("g1/0", "g1/1")
        ]
        await asyncio.sleep(0)
        assert recording.covers("g1/0")
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        assert not recording.covers("g1/0")
        assert not recording._started
        recording.close()

    asyncio.run(scenario())


def test_a_damaged_recording_is_named_and_a_run_without_one_says_how_to_get_one(tmp_path: Path, loop: Any) -> None:
    folder = Folder(tmp_path, loop, **SCHEDULE | {"updates": 1})
    folder.live()
    path = tmp_path / "recording"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match=r"recording .*is damaged: .*cannot be replayed"):
        list(read_recording(path))
    path.unlink()
    with pytest.raises(RunFolderError, match="ale train --record"):
        list(read_recording(path))
