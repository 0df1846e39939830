"""What a run holds open, from the first demonstration to the last evaluation: processes, sandboxes, actors."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec

from ale.actors.concurrency import Concurrency, free_memory_mb
from ale.actors.env_manager import EnvManager
from ale.actors.episodes import Episodes, HeardPolicy
from ale.actors.evaluation import evaluate_tasks, rate
from ale.actors.evaluator import Evaluator
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.load import Load
from ale.actors.loop_lag import LoopLag
from ale.actors.multiplexer import Devices, Pool, open_devices
from ale.actors.reward import Reward
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots, count_slots
from ale.actors.stop import Stop
from ale.actors.taped import Play, TapedPolicy
from ale.actors.trainer import Trainer, Update, redo
from ale.actors.watchdog import Keep, Watchdog
from ale.agent.chat import Chat
from ale.agent.episode import Judge, demonstrate
from ale.bus import Bus
from ale.config import RunConfig
from ale.data.events import Evaluated
from ale.data.recording import Life
from ale.data.run_folder import RunFolder
from ale.data.task_stream import TaskStream
from ale.envs.env import MakeEnv
from ale.envs.terminal import ProgramEnv, TerminalEnv
from ale.errors import LearnerError, RunFolderError
from ale.learner.weights import create_memory
from ale.mailbox import Wait
from ale.messages import (
    Demonstration,
    OpenLearner,
    Saved,
    SaveModel,
    SaveState,
    Trajectory,
)
from ale.models.load import load_tokenizer
from ale.policy.embedded import EmbeddedPolicy
from ale.policy.open import Learning, open_policy
from ale.policy.port import OpenPolicy, Policy
from ale.policy.turnwise import TurnwisePolicy
from ale.process import WorkerProcess
from ale.progress import Phase, Progress, Rate
from ale.sandbox import AlarmRules, Mount, SandboxEngine, open_engine
from ale.supervisor import Supervisor
from ale.tape import Tape
from ale.task import Task
from ale.waiting import held_up, named, progressed, register

Report = Callable[[Progress], None]
Demonstrate = Callable[[Task], Awaitable[tuple[Demonstration, ...]]]
_OPEN_DEADLINE_S = 300.0
_GRADERS = 4
_BEAT_S = 1.0
_SHOWN_WAITS = 6


class Run:
    """What stays open from the first demonstration to the last evaluation: bus, sandboxes, policy, supervisor."""

    def __init__(
        self,
        config: RunConfig,
        engine: SandboxEngine | None,
        bus: Bus,
        supervisor: Supervisor,
        chat: Chat,
        make_env: MakeEnv | None,
        judge: Judge | None,
        stop: Stop,
        keep: Keep,
        stuck: Callable[[str], None] | None,
    ) -> None:
        self.config = config
        self.stop = stop
        self._engine = engine
        self._bus = bus
        self._supervisor = supervisor
        self._chat = chat
        self._weights = create_memory()
        self._slots = config.rollout.max_lag + 2
        self._loop_lag = LoopLag()
        self._episodes = Episodes(config.rollout.concurrency)
        self._reward = None if engine is None else Reward(engine, concurrency=_GRADERS, label=config.name)
        self._make_env = make_env or self._in_sandbox
        self._judge = judge
        self._load = Load()
        self._devices = Devices()
        self._policy: Policy | None = None
        self._counters: Callable[[], dict[str, float]] = dict
        self._concurrency: Concurrency | None = None
        self._last: Progress | None = None
        self.watchdog = Watchdog(config.silence_s, keep, lambda: self._last, stuck=stuck)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: RunConfig,
        model: Path,
        *,
        make_env: MakeEnv | None = None,
        judge: Judge | None = None,
        stop: Stop | None = None,
        tape: Tape | None = None,
        keep: Keep = lambda moment: None,
        stuck: Callable[[str], None] | None = None,
    ) -> AsyncIterator[Run]:
        """`make_env` and `judge` take the places of the sandbox and of the tasks' tests. Raises `ModelError` when the
        model's chat template cannot say what the agent is told."""
        chat = Chat(load_tokenizer(model))
        chat.start("an instruction", config.agent.system_prompt)
        bus = Bus(tape=tape)
        async with AsyncExitStack() as stack:
            box = config.sandbox
            opened = open_engine(box.kind, image=box.image, runtime=box.runtime, label=f"run {config.name}")
            engine = await stack.enter_async_context(opened) if make_env is None else None
            owner = Supervisor(bus, on_failure=lambda error: run.watchdog.freeze(error))
            supervisor = await stack.enter_async_context(owner)
            run = cls(config, engine, bus, supervisor, chat, make_env, judge, stop or Stop(), keep, stuck)
            try:
                await supervisor.start(run._loop_lag)
                await supervisor.start(run.watchdog)
                if run._reward is not None:
                    await supervisor.start(run._reward)
                yield run
            finally:
                os.close(run._weights)

    @asynccontextmanager
    async def engine_process(self, model: Path, *, learner: WorkerProcess | None = None) -> AsyncIterator[Policy]:
        """The policy and the environment manager that asks it. Without a learner its weights stay those of `model`."""
        learning = None
        if learner is not None:
            learning = Learning(self._weights, self._slots, partial(self._save, learner))
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(open_policy(self.config, model, learning))
            watching = self._supervisor.spawn(engine.watch(), name="engine_watch")
            stack.push_async_callback(self._supervisor.stop, watching)
            c = self.config.rollout
            if self.config.model.pool is not None:
                assert isinstance(engine, EmbeddedPolicy)  # the configuration sees to it
                pool = Pool(devices=self.config.model.pool, training=self.config.update_threads)
                self._devices = await open_devices(pool, engine.set_threads)
            policy: OpenPolicy = engine
            if c.versions == "turn":
                policy = TurnwisePolicy(engine, drain_s=c.turn_drain_s)
            self._counters = policy.counters
            # An agent that is a program is on the tape as a whole; the turns of any other are, one by one.
            play = await stack.enter_async_context(self._agent(HeardPolicy(policy, self._episodes), model))
            taped = self._policy = TapedPolicy(policy, self._bus.tape)
            self._concurrency = Concurrency(
                self._episodes, engine.statistics, self._sandbox_room, most=c.concurrency, adaptive=c.adaptive
            )
            manager = EnvManager(
                HeardPolicy(taped, self._episodes),
                self._make_env,
                self._chat,
                self.config.agent,
                self._episodes,
                concurrency=c.concurrency,
                judge=self._judge,
                play=play,
            )
            await self._supervisor.start(manager)
            await self._supervisor.start(self._concurrency)
            try:
                yield taped
            finally:
                await self._supervisor.stop(self._concurrency)
                await self._supervisor.stop(manager)

    @asynccontextmanager
    async def _agent(self, policy: Policy, model: Path) -> AsyncIterator[Play | None]:
        """How episodes are played where the agent is a program of its own; None: by the built-in loop."""
        if self.config.agent.kind == "builtin":
            yield None
            return
        from ale.proxy.command import open_command_agent  # needs the extra `proxy`

        async with open_command_agent(policy, load_tokenizer(model), self._in_sandbox, self.config) as agent:
            yield agent.play

    @asynccontextmanager
    async def learner_process(self, model: Path, state: Path | None = None) -> AsyncIterator[WorkerProcess]:
        """The learner, and the engine that samples from what it publishes. `state`: a checkpoint to go on from."""
        threads = self.config.model.threads
        settings = OpenLearner(
            model=str(model),
            weights_fd=self._weights,
            slots=self._slots,
            threads=threads,
            algorithm=self.config.algorithm,
            learner=self.config.learner,
            temperature=self.config.rollout.temperature,
            state=str(state) if state is not None else None,
            precision=self.config.model.precision,
        )
        async with WorkerProcess(
            "ale.learner.learner_process",
            error=LearnerError,
            pass_fds=(self._weights,),
            env={"OMP_NUM_THREADS": str(threads)},
        ) as learner:
            with held_up("the learner to load its model", release="its end", on="process learner"):
                opened = await learner.ask(settings, deadline_s=_OPEN_DEADLINE_S)
            async with self.engine_process(model, learner=learner) as policy:
                await policy.load_weights(opened.version, opened.slot)
                yield learner

    async def catch_up(self, learner: WorkerProcess, ledger: Ledger, tell: Report) -> None:
        """Makes the updates again that the journal holds and the checkpoint does not: the same, of the same samples."""
        since = ledger.books.since
        for number, trained in enumerate(since, start=1):
            self.stop.check()
            metrics = await redo(learner, trained, self.config)
            progressed(f"update {trained.event.number}, made again")
            tell(self.progress("resume", number, len(since), {"update": trained.event.number}))
            if number == len(since):
                await self.policy.load_weights(metrics.version, metrics.slot)

    async def optimise(
        self,
        learner: WorkerProcess,
        tasks: TaskStream,
        folder: RunFolder,
        ledger: Ledger,
        after: Callable[[Update], Awaitable[None]],
    ) -> None:
        """The asynchronous loop: returns after the last update. What still runs then stays in the books as running."""
        c, books = self.config.rollout, ledger.books
        if books.updates >= self.config.learner.updates:
            return
        running = {group.drawn: group for group in books.groups.values() if not group.buffered}
        wanted = {drawn: group.task for drawn, group in running.items()}
        found = await asyncio.to_thread(tasks.go_to, books.drawn, wanted)
        slots = Slots(count_slots(c), books.groups)
        if folder.recording is not None:
            life = Life(number=books.lives, journal=folder.journal.size, version=self.policy.version)
            folder.recording.begin(life, [name for group in running.values() for name in group.running])
        async with Supervisor(self._bus, on_failure=self.watchdog.freeze) as actors:
            buffer = SampleBuffer(slots, ledger, max_lag=c.max_lag, on_stale=c.on_stale)
            under_way = {running[drawn].id: task for drawn, task in found.items()}
            generator = Generator(self.config, tasks, slots, ledger, self._episodes, under_way)
            trainer = Trainer(self.config, learner, self.policy, slots, ledger, after, self.stop, self._devices)
            for actor in (buffer, generator, trainer):
                await actors.start(actor)
            await actors.join(trainer)

    async def evaluate(
        self, tasks: Sequence[Task], name: str, tell: Report, *, beside: bool = False
    ) -> tuple[Rate, list[Trajectory]]:
        """Success on `tasks`, and how each of them went. `beside`: while training goes on, which has the progress and
        three quarters of the places."""

        def done(n: int) -> None:
            if not beside:
                tell(self.progress("evaluate", n, len(tasks), {}))

        at_once = max(1, self.config.rollout.concurrency // 4) if beside else None
        seen = await self.stop.unless(evaluate_tasks(self._bus, self.config, tasks, name, done, at_once=at_once))
        return rate(seen, self.config.eval), seen

    @asynccontextmanager
    async def evaluator(self, evaluate: Callable[[int], Awaitable[object]]) -> AsyncIterator[Evaluator]:
        """Makes evaluations beside training."""
        async with Supervisor(self._bus, on_failure=self.watchdog.freeze) as actors:
            evaluator = Evaluator(evaluate)
            await actors.start(evaluator)
            yield evaluator

    async def evaluate_once(
        self,
        tasks: Sequence[Task],
        name: str,
        update: int,
        tell: Report,
        folder: RunFolder,
        ledger: Ledger,
        *,
        beside: bool = False,
    ) -> Rate | None:
        """The evaluation of this name after this update: recorded, and not made again by a run that is resumed. None
        when there are no tasks. Which versions it sampled from is recorded with it: one, or several `beside` training.
        """
        key = f"{name}@{update}"
        if not tasks:
            return None
        if key not in ledger.books.rates:
            result, seen = await self.evaluate(tasks, name, tell, beside=beside)
            for trajectory in seen:
                folder.keep(trajectory, evaluation=name)
            versions = [v for t in seen for v in t.version_A.numpy().tolist()]
            between = {"versions": [min(versions), max(versions)]} if versions else {}
            folder.record(evaluation=name, success=result.success, ci95=result.ci95, n=result.n, **between)
            ledger.book(Evaluated(name=name, update=update, rate=result, sizes=folder.sizes))
        return ledger.books.rates[key]

    async def checkpoint(self, learner: WorkerProcess, folder: RunFolder, ledger: Ledger) -> None:
        """Call it between two updates, when the learner has made all that the ledger holds. Raises `RunFolderError`."""
        path = folder.checkpoints.begin()
        saved = await learner.ask(SaveState(path=str(path)), deadline_s=self.config.learner.step_deadline_s)
        _check_saved(saved, path)
        await folder.commit(ledger.books)

    async def export(self, learner: WorkerProcess, path: Path) -> None:
        """The trained model as a Hugging Face directory: whole, or not there. Raises `RunFolderError`."""
        unfinished = path.with_name(f".{path.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        await self._save(learner, unfinished)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)

    async def _save(self, learner: WorkerProcess, path: Path) -> None:
        """The learner's model as it is now, as a Hugging Face directory. Raises `RunFolderError`."""
        saved = await learner.ask(SaveModel(path=str(path)), deadline_s=self.config.learner.step_deadline_s)
        _check_saved(saved, path)

    @property
    def policy(self) -> Policy:
        assert self._policy is not None, "engine_process() opens the policy"
        return self._policy

    def load(self) -> dict[str, float]:
        """How busy the machine is, for the record of an update."""
        return {
            "loop_lag_p99_ms": self._loop_lag.quantile_ms(0.99),
            "sandboxes_alive": float(self._engine.statistics().alive if self._engine else 0),
            **{name: float(n) for name, n in register().counters.items()},
            **self._counters(),
            **(self._concurrency.load() if self._concurrency is not None else {}),
        }

    def _sandbox_room(self) -> int:
        """How many more sandboxes this machine has memory for, if each uses all that it may."""
        if self._engine is None:
            return self.config.rollout.concurrency  # the environments are no sandboxes of ours
        return free_memory_mb() // self.config.sandbox.memory_mb

    def components(self) -> dict[str, float]:
        """How busy each component was since the last call, and what it uses."""
        return self._load.since_last()

    def progress(self, phase: Phase, step: int, total: int, values: dict[str, float]) -> Progress:
        self._last = Progress(
            phase=phase, step=step, total=total, values=values, waits=in_a_few_words(self._bus.waits())
        )
        return self._last

    def follow(self, tell: Report) -> None:
        """Tells the progress every second as well: a step may take long, and what is waited for changes meanwhile."""
        self._supervisor.spawn(self._beat(tell), name="progress")

    async def _beat(self, tell: Report) -> None:
        while True:
            with named("its next beat", idle=True):
                await asyncio.sleep(_BEAT_S)
            if (last := self._last) is not None:
                values = last.values | self.load() if last.phase == "train" else last.values
                tell(self.progress(last.phase, last.step, last.total, values))

    def _in_sandbox(self, task: Task) -> TerminalEnv:
        c, engine, reward = self.config, self._engine, self._reward
        assert engine is not None
        assert reward is not None
        env = ProgramEnv if task.actions == "python" else TerminalEnv
        return env(
            msgspec.structs.replace(task, memory_mb=min(task.memory_mb, c.sandbox.memory_mb)),
            engine,
            lambda task, snapshot: reward.ask(self._bus, task, snapshot),
            pids=c.sandbox.pids,
            max_output_chars=c.agent.max_output_chars,
            command_timeout_s=c.agent.command_timeout_s,
            alarms=AlarmRules(**c.sandbox.alarms),
            label=c.name,
            mounts=tuple(Mount(os.path.abspath(source), target) for source, target in c.agent.mounts.items()),
        )

    @asynccontextmanager
    async def demonstrator(self) -> AsyncIterator[Demonstrate]:
        """What carries out a reference solution: the built-in loop, or the run's own program before an oracle."""
        if self.config.agent.kind == "builtin":

            async def show(task: Task) -> tuple[Demonstration, ...]:
                return (await demonstrate(task, self._make_env, self._chat, self.config.agent, self._judge),)

            yield show
            return
        from ale.proxy.oracle import open_demonstrator  # needs the extra `proxy`

        async with open_demonstrator(self._chat.tokenizer, self._in_sandbox, self.config) as demonstrator:
            yield demonstrator.demonstrate


def in_a_few_words(waits: Sequence[Wait]) -> tuple[str, ...]:
    """Who waits for what and how long, the longest wait first; those who wait for the same are one line:
    `("trainer: 8 groups to train version 3 on (12 s)", "48 tasks: the answer of actor 'envs' to Rollout (9 s)")`."""
    alike: dict[str, list[Wait]] = {}
    for wait in waits:
        if not wait.what.startswith("a message in the inbox"):  # has nothing to do
            alike.setdefault(wait.what, []).append(wait)
    return tuple(
        f"{same[0].who if len(same) == 1 else f'{len(same)} tasks'}: {what} ({same[0].waited_s:.0f} s)"
        for what, same in islice(alike.items(), _SHOWN_WAITS)
    )


def _check_saved(saved: Saved, path: Path) -> None:
    if saved.problem is not None:
        raise RunFolderError.cannot_write(path, saved.problem)
