"""A recorded run once more, without sampling and without sandboxes: the real actors and the real learner, on the tape.

The journal says what has to come of it. Each event of the replay is compared with it as it is booked, so that the first
one that differs is named: which rollout, which token, which batch, which loss.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from ale.actors.env_manager import EnvManager
from ale.actors.episodes import Episodes, HeardPolicy
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots, count_slots
from ale.actors.stop import Stop
from ale.actors.taped import TapedPolicy
from ale.actors.trainer import Learner, Trainer, Update
from ale.agent.chat import Chat
from ale.bus import Bus
from ale.config import RunConfig
from ale.config_file import load
from ale.data.books import Books
from ale.data.journal import read_journal
from ale.data.recording import Entry, Life, Stub, check_recorded, read_recording
from ale.data.script import LifeOver, Script
from ale.data.task_stream import TaskStream
from ale.envs.env import Env, Step
from ale.errors import ActorError, ActorStopped, Diverged, LearnerError, PolicyError
from ale.learner.weights import create_memory
from ale.messages import Generate, OpenLearner, Score, StartPolicyOptimization, Trajectory, Turn
from ale.models.load import load_tokenizer
from ale.player import Player
from ale.process import WorkerProcess
from ale.supervisor import Supervisor
from ale.task import Task
from ale.warm_start import Checks, imitation
from ale.wire import Reply, Request

_OPEN_DEADLINE_S = 300.0
_STOP_DEADLINE_S = 1.0
_FOREVER_S = 1e9
_ANY = 1 << 30  # episodes begin when the recording says so, not when there is room
_FOLLOWS = 100  # turns of the event loop in which what follows the last point is booked


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """`Replayed(lives=2, updates=12, rollouts=480, points=31415, loss_apart=0.0, diverged=None)`."""

    lives: int
    updates: int
    rollouts: int
    points: int
    loss_apart: float
    """The largest difference between a loss and the recorded one."""
    diverged: str | None
    """The first difference; None where the replay went as the run did, to its end or to where it was cut off."""


class _NoPolicy:
    """Nothing is sampled: every turn comes from the recording."""

    def __init__(self, version: int) -> None:
        self.version = version

    async def generate(self, request: Generate) -> Turn:
        raise PolicyError(f"{request.session}: nothing is sampled in a replay")

    async def end_session(self, session: str) -> None:
        pass

    async def load_weights(self, version: int, slot: int) -> None:
        self.version = version


class _NoEnv:
    """Nothing is carried out: every answer comes from the recording."""

    async def reset(self) -> str:
        raise AssertionError("a replay has no environment")

    async def step(self, action: str) -> Step:
        raise AssertionError("a replay has no environment")

    async def score(self) -> Score:
        raise AssertionError("a replay has no environment")

    async def close(self) -> None:
        pass


class _AtWork:
    """The learner, whose work takes time. An update that the recorded life was killed in is not made: the next life
    began from weights that know nothing of it."""

    def __init__(self, learner: Learner, player: Player, makes: Callable[[], bool]) -> None:
        self._learner, self._player, self._makes = learner, player, makes

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        if not self._makes():
            await self._player.killed()
        with self._player.working():
            return await self._learner.ask(request, deadline_s=deadline_s)


class Tasks(TaskStream):
    """The tasks that were taken, by their numbers; it ends where the recording ends."""

    def __init__(self, stubs: dict[int, Task], drawn: int) -> None:
        super().__init__(iter(()))
        self._stubs = stubs
        self.drawn = drawn

    def __next__(self) -> Task:
        if self.drawn + 1 not in self._stubs:
            raise StopIteration
        self.drawn += 1
        return self._stubs[self.drawn]


async def _no_play(rollout: Any) -> Trajectory:
    raise AssertionError("a replay starts no agent")


async def _no_judge(trajectory: Trajectory) -> float:
    raise AssertionError("a replay asks no reward function")


class Part(msgspec.Struct, frozen=True):
    """One life of the recorded run's loop. `entries` are read as they are played: a life may last a week."""

    life: Life
    entries: Iterable[Entry]
    tasks: dict[int, Task]
    """All that the run had taken, by number."""
    judged: bool
    """Whether a reward function of a program was asked."""


def parts(read: Callable[[], Iterable[Entry]]) -> Iterator[Part]:
    """The recording, life by life: each is to be played before the next is taken. `read` begins at its first entry."""
    tasks: dict[int, Task] = {}
    judged = False
    for entry in read():
        judged |= entry.kind == "judge"
        if isinstance(entry.answer, Stub):
            tasks[entry.answer.drawn] = entry.answer.task()
    begun: list[Life] = []

    def life(entry: Entry) -> int:
        if isinstance(entry.answer, Life):
            begun.append(entry.answer)
        return len(begun)

    for number, entries in groupby(read(), key=life):
        if number:
            yield Part(begun[number - 1], entries, tasks, judged)


async def replay_lives(
    config: RunConfig,
    recorded: Iterable[Part],
    books: Books,
    script: Script,
    learner: Learner,
    chat: Chat | None = None,
) -> AsyncIterator[tuple[Part, int]]:
    """Each life that booked anything, once it is replayed, and how many points it passed. Raises `Diverged`."""
    for part in recorded:
        script.catch_up(books)
        if part.life.number < books.lives:
            continue  # it was ended before it had booked anything
        if part.life.number > books.lives:
            raise Diverged(f"the recording goes on with life {part.life.number}, the journal with life {books.lives}")
        yield part, await replay_life(config, part, books, script, learner, chat)


async def replay_life(
    config: RunConfig, part: Part, books: Books, script: Script, learner: Learner, chat: Chat | None = None
) -> int:
    """The loop of one life, from these books on, which it changes. Returns how many points were passed.

    Raises `Diverged`. `chat` None: no episode is played turn by turn, all come whole from the recording.
    """
    c = patient(config)
    player = Player(part.entries)
    bus = Bus(tape=player)
    ledger = Ledger(books, script.write)
    policy = TapedPolicy(_NoPolicy(part.life.version), player)
    episodes = Episodes(_ANY)
    slots = Slots(count_slots(c.rollout), books.groups)
    running = {group.drawn: group for group in books.groups.values() if not group.buffered}
    unknown = [drawn for drawn in running if drawn not in part.tasks]
    if unknown:
        raise Diverged(f"the recording does not know task number {unknown[0]}, which the journal says was taken")
    under_way = {group.id: part.tasks[drawn] for drawn, group in running.items()}
    tasks = Tasks(part.tasks, books.drawn)

    async def after(update: Update) -> None:
        books.since.clear()

    def makes() -> bool:
        return script.makes(books.updates + 1, part.life.number)

    make_env: Callable[[Task], Env] = lambda task: _NoEnv()  # noqa: E731
    whole = chat is None or c.agent.kind != "builtin"
    # All that can be under way, replacements included.
    rollouts = 3 * slots.total * (c.rollout.group_size + c.rollout.extra_members)
    manager = EnvManager(
        HeardPolicy(policy, episodes),
        make_env,
        chat,  # type: ignore[arg-type]  # only what plays turn by turn reads it
        c.agent,
        episodes,
        concurrency=rollouts,
        play=_no_play if whole else None,
        judge=_no_judge if part.judged else None,
    )
    try:
        async with Supervisor(bus, stop_deadline_s=_STOP_DEADLINE_S) as outer:
            await outer.start(manager)
            async with Supervisor(bus, stop_deadline_s=_STOP_DEADLINE_S) as actors:
                buffer = SampleBuffer(slots, ledger, max_lag=c.rollout.max_lag, on_stale=c.rollout.on_stale)
                buffer.concurrency = buffer.capacity + 1  # whatever has its turn must not stand behind what has not
                generator = Generator(c, tasks, slots, ledger, episodes, under_way)
                trainer = Trainer(c, _AtWork(learner, player, makes), policy, slots, ledger, after, Stop())
                for actor in (buffer, generator, trainer):
                    await actors.start(actor)
                try:
                    await _until_over(player, actors.join(trainer))
                except Diverged as error:
                    script.diverged = str(error)
                await actors.stop(trainer)
                await actors.stop(generator)
                script.over = True
                player.release()
    except (LifeOver, Diverged, ActorError, ActorStopped) as error:
        # What an actor was stopped by goes to whoever supervises it, in one form or another.
        if script.diverged is None and not script.over:
            raise
        cause: BaseException | None = error
    else:
        cause = None
    if script.diverged is not None:
        raise Diverged(script.diverged) from cause
    return player.passed


async def _until_over(player: Player, trained: Coroutine[Any, Any, None]) -> None:
    """Until the last point of the recording and what follows it: rollouts end behind the last update too."""
    watching = asyncio.create_task(player.watch(), name="the watch over the order")
    training = asyncio.create_task(trained, name="the last update")
    try:
        await asyncio.wait({watching, training}, return_when=asyncio.FIRST_COMPLETED)
        if training.done():
            training.result()
        await watching
        for _ in range(_FOLLOWS):
            await asyncio.sleep(0)
    finally:
        for task in (watching, training):
            task.cancel()
        await asyncio.gather(watching, training, return_exceptions=True)


def patient(config: RunConfig) -> RunConfig:
    """The same run, in which no deadline of the loop passes: those that did are in the recording."""
    replace = msgspec.structs.replace
    return replace(
        config,
        agent=replace(config.agent, episode_timeout_s=_FOREVER_S),
        rollout=replace(config.rollout, batch_deadline_s=_FOREVER_S, straggler_s=None, straggler_factor=None),
    )


async def replay(run: Path, *, tell: Callable[[str], None] = lambda said: None) -> Replayed:
    """Runs the recorded run in this folder again. Changes nothing in it. Raises `RunFolderError`."""
    check_recorded(run / "recording")
    config = load(run)
    recorded = parts(lambda: read_recording(run / "recording"))
    script = Script(lambda: read_journal(run / "journal"))
    model = run / "model" if config.model.path == "nano" else Path(config.model.path)
    chat = Chat(load_tokenizer(model))
    lives = points = 0
    diverged: str | None = None
    async with _open_learner(config, model) as learner:
        books = script.catch_up(Books())
        await _warm_up(config, books, learner, tell)
        try:
            async for part, passed in replay_lives(config, recorded, books, script, learner, chat):
                lives, points = lives + 1, points + passed
                tell(f"life {part.life.number}: {script.updates} updates, {script.rollouts} rollouts, as recorded")
            script.catch_up(books)
            script.check_through()
        except Diverged as error:
            diverged = str(error)
    return Replayed(
        lives=lives,
        updates=script.updates,
        rollouts=script.rollouts,
        points=points,
        loss_apart=script.loss_apart,
        diverged=diverged,
    )


@asynccontextmanager
async def _open_learner(config: RunConfig, model: Path) -> AsyncIterator[WorkerProcess]:
    """As a run opens it, before its first step."""
    memory, threads = create_memory(), config.model.threads
    try:
        async with WorkerProcess(
            "ale.learner.learner_process",
            error=LearnerError,
            pass_fds=(memory,),
            env={"OMP_NUM_THREADS": str(threads)},
        ) as learner:
            settings = OpenLearner(
                model=str(model),
                weights_fd=memory,
                slots=config.rollout.max_lag + 2,
                threads=threads,
                algorithm=config.algorithm,
                learner=config.learner,
                temperature=config.rollout.temperature,
                precision=config.model.precision,
            )
            await learner.ask(settings, deadline_s=_OPEN_DEADLINE_S)
            yield learner
    finally:
        os.close(memory)


async def _warm_up(config: RunConfig, books: Books, learner: WorkerProcess, tell: Callable[[str], None]) -> None:
    """The supervised updates, from the demonstrations in the journal; ended where the run ended them."""
    c, deadline_s = config.warm_start, config.learner.step_deadline_s
    for step, request in enumerate(imitation(c, config.seed, books.demonstrations or ()), start=1):
        await learner.ask(request, deadline_s=deadline_s)
        rate = books.rates.get(f"{Checks.name(step)}@0")
        if rate is not None and rate.success >= c.stop_at:
            break
    await learner.ask(StartPolicyOptimization(), deadline_s=deadline_s)
    if c.steps:
        tell(f"the warm start: {step} steps")
