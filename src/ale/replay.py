"""A recorded run once more, without sampling and without sandboxes: the real actors and the real learner, on the tape.

The journal says what has to come of it. Each event of the replay is compared with it as it is booked, so that the first
one that differs is named: which rollout, which token, which batch, which loss.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from ale.actors.env_manager import EnvManager
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots
from ale.actors.stop import Stop
from ale.actors.taped import TapedPolicy
from ale.actors.trainer import Learner, Trainer, Update
from ale.agent.chat import Chat
from ale.bus import Bus
from ale.config import RunConfig, load
from ale.data.books import Books
from ale.data.compare import first_difference
from ale.data.events import Began, Evaluated, Event, Recorded, Resumed, TasksShown, Updated
from ale.data.journal import read_journal
from ale.data.recording import Entry, Life, Stub, read_recording
from ale.data.task_stream import TaskStream
from ale.envs.env import Env, Step
from ale.errors import ActorError, ActorStopped, LearnerError, PolicyError
from ale.learner.weights import create_memory
from ale.messages import Generate, OpenLearner, Score, StartPolicyOptimization, Trajectory, Turn
from ale.models.load import load_tokenizer
from ale.player import Diverged, Player
from ale.process import WorkerProcess
from ale.supervisor import Supervisor
from ale.task import Task
from ale.warm_start import Checks, imitation
from ale.wire import Reply, Request

TOLERANCE = 1e-6
"""Of a loss and of a gradient norm, absolutely or in proportion."""
_OPEN_DEADLINE_S = 300.0
_STOP_DEADLINE_S = 1.0
_FOREVER_S = 1e9
# What the clock says, and what the recorded run did beside its loop.
_CLOCKED = frozenset({"duration_s", "wait_s", "step_s", "values"})
_BESIDE = (Began, TasksShown, Recorded, Evaluated, Resumed)


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


class _LifeOver(Exception):
    """The recorded life was ended before it had booked this."""


class Script:
    """What the journal says that comes next. `write` is what a ledger calls before each move."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._events = enumerate(events, start=1)
        self._next: tuple[int, Event] | None = next(self._events, None)
        self.updates = self.rollouts = 0
        self.loss_apart = 0.0
        self.diverged: str | None = None
        self.over = False

    def books(self) -> Books:
        """Those of the run when the loop of its next life began: everything up to there that is beside the loop."""
        return self.catch_up(Books())

    def catch_up(self, books: Books) -> Books:
        self.over = False
        while self._next is not None and isinstance(self._next[1], _BESIDE):
            books.apply(self._next[1])
            self._step()
        return books

    def write(self, event: Event) -> None:
        while self._next is not None and isinstance(self._next[1], Recorded | Evaluated):
            self._step()
        if self._next is None or isinstance(self._next[1], _BESIDE) or self.over:
            self.over = True
            raise _LifeOver
        number, recorded = self._next
        self._compare(number, recorded, event)
        self._step()

    def _step(self) -> None:
        self._next = next(self._events, None)

    def _compare(self, number: int, recorded: Event, event: Event) -> None:
        if isinstance(recorded, Updated) and isinstance(event, Updated):
            self.loss_apart = max(self.loss_apart, abs(recorded.metrics.loss - event.metrics.loss))
            self.updates += 1
        self.rollouts += type(event).__name__ in ("RolloutKept", "RolloutDropped")
        if type(recorded) is not type(event):
            said: str | None = f"recorded is {_named(recorded)}, replayed is {_named(event)}"
        else:
            said = first_difference(recorded, event, tolerance=TOLERANCE, skip=_CLOCKED)
            said = None if said is None else f"{_named(recorded)}: {said}"
        if said is not None:
            self.diverged = f"event {number} of the journal, recorded and replayed: {said}"
            raise Diverged(self.diverged)


def _named(event: Event) -> str:
    """`"RolloutKept g3/1"`"""
    for field in ("rollout", "group", "number"):
        if hasattr(event, field):
            return f"{type(event).__name__} {getattr(event, field)}"
    trajectory: Trajectory | None = getattr(event, "trajectory", None)
    return type(event).__name__ if trajectory is None else f"{type(event).__name__} {trajectory.id}"


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
    """The learner, whose work takes time."""

    def __init__(self, learner: Learner, player: Player) -> None:
        self._learner, self._player = learner, player

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
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
    """One life of the recorded run's loop."""

    life: Life
    entries: list[Entry]
    tasks: dict[int, Task]


def parts(entries: Iterable[Entry]) -> Iterator[Part]:
    """The recording, life by life; tasks that an earlier life had taken are known to later ones."""
    tasks: dict[int, Task] = {}
    life: Life | None = None
    held: list[Entry] = []
    for entry in entries:
        if isinstance(entry.answer, Life):
            if life is not None:
                yield Part(life, held, tasks)
            life, held = entry.answer, []
        elif isinstance(entry.answer, Stub):
            tasks[entry.answer.drawn] = entry.answer.task()
        else:
            held.append(entry)
    if life is not None:
        yield Part(life, held, tasks)


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
    total = c.rollout.groups_per_step * (c.rollout.max_lag + 1)
    slots = Slots(total, books.groups)
    running = {group.drawn: group for group in books.groups.values() if not group.buffered}
    unknown = [drawn for drawn in running if drawn not in part.tasks]
    if unknown:
        raise Diverged(f"the recording does not know task number {unknown[0]}, which the journal says was taken")
    under_way = {group.id: part.tasks[drawn] for drawn, group in running.items()}
    tasks = Tasks(part.tasks, books.drawn)

    async def after(update: Update) -> None:
        books.since.clear()

    make_env: Callable[[Task], Env] = lambda task: _NoEnv()  # noqa: E731
    whole = chat is None or c.agent.kind != "builtin"
    judged = any(entry.kind == "judge" for entry in part.entries)
    rollouts = 3 * total * c.rollout.group_size  # all that can be under way, replacements included
    manager = EnvManager(
        policy,
        make_env,
        chat,  # type: ignore[arg-type]  # only what plays turn by turn reads it
        c.agent,
        concurrency=rollouts,
        play=_no_play if whole else None,
        judge=_no_judge if judged else None,
    )
    try:
        async with Supervisor(bus, stop_deadline_s=_STOP_DEADLINE_S) as outer:
            await outer.start(manager)
            async with Supervisor(bus, stop_deadline_s=_STOP_DEADLINE_S) as actors:
                buffer = SampleBuffer(slots, ledger, max_lag=c.rollout.max_lag, on_stale=c.rollout.on_stale)
                buffer.concurrency = buffer.capacity + 1  # whatever has its turn must not stand behind what has not
                generator = Generator(c, tasks, slots, ledger, under_way)
                trainer = Trainer(c, _AtWork(learner, player), policy, slots, ledger, after, Stop())
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
    except (_LifeOver, Diverged, ActorError, ActorStopped) as error:
        # What an actor was stopped by goes to whoever supervises it, in one form or another.
        if script.diverged is None and not script.over:
            raise
        cause: BaseException | None = error
    else:
        cause = None
    if script.diverged is not None:
        raise Diverged(script.diverged) from cause
    return player.passed


async def _until_over(player: Player, trained: Any) -> None:
    """Until the last update, or the last point of the recording and what follows it."""
    watching = asyncio.create_task(player.watch(), name="the watch over the order")
    training = asyncio.create_task(trained, name="the last update")
    try:
        await asyncio.wait({watching, training}, return_when=asyncio.FIRST_COMPLETED)
        if training.done():
            training.result()
            return
        watching.result()
        for _ in range(100):  # turns in which what follows the last point is booked
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
        rollout=replace(config.rollout, batch_deadline_s=_FOREVER_S),
    )


async def replay(run: Path, *, tell: Callable[[str], None] = lambda said: None) -> Replayed:
    """Runs the recorded run in this folder again. Changes nothing in it. Raises `RunFolderError`."""
    config = load(run)
    recorded = list(parts(read_recording(run / "recording")))
    script = Script(read_journal(run / "journal"))
    model = run / "model" if config.model.path == "nano" else Path(config.model.path)
    chat = Chat(load_tokenizer(model))
    lives = points = 0
    diverged: str | None = None
    async with _open_learner(config, model) as learner:
        books = script.books()
        await _warm_up(config, books, learner, tell)
        for part in recorded:
            script.catch_up(books)
            try:
                points += await replay_life(config, part, books, script, learner, chat)
            except Diverged as error:
                diverged = str(error)
                break
            lives += 1
            tell(f"life {part.life.number}: {script.updates} updates, {script.rollouts} rollouts, as recorded")
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
