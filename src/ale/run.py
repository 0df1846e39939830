"""What a run holds open, from the first demonstration to the last evaluation: processes, sandboxes, actors."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import msgspec

from ale.actors.env_manager import EnvManager
from ale.actors.evaluation import evaluate_tasks, rate
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.loop_lag import LoopLag
from ale.actors.reward import Reward
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots
from ale.actors.trainer import Trainer, Update
from ale.agent.chat import Chat
from ale.agent.episode import demonstrate
from ale.bus import Bus
from ale.config import RunConfig
from ale.data.run_folder import RunFolder
from ale.envs.env import Env
from ale.envs.source import Source
from ale.envs.terminal import TerminalEnv
from ale.errors import ConfigError, LearnerError
from ale.learner.weights import create_memory
from ale.messages import (
    Demonstration,
    Imitate,
    OpenEngine,
    OpenLearner,
    SaveCheckpoint,
    StartPolicyOptimization,
)
from ale.models.load import load_tokenizer
from ale.policy.embedded import EmbeddedPolicy, open_embedded
from ale.process import WorkerProcess
from ale.progress import Phase, Progress, Rate
from ale.sandbox import AlarmRules, SandboxEngine, open_engine
from ale.supervisor import Supervisor
from ale.task import Task

Report = Callable[[Progress], None]
_OPEN_DEADLINE_S = 300.0
_GRADERS = 4
_WARM_UP_STEPS = 20
# Tasks looked at for each demonstration wanted, before the stream is said to lack them.
_LOOK_AT_MOST = 50


class Run:
    """What stays open from the first demonstration to the last evaluation: bus, sandboxes, policy, supervisor."""

    def __init__(self, config: RunConfig, engine: SandboxEngine, bus: Bus, supervisor: Supervisor, chat: Chat) -> None:
        self.config = config
        self._engine = engine
        self._bus = bus
        self._supervisor = supervisor
        self._chat = chat
        self._weights = create_memory()
        self._slots = config.rollout.max_lag + 2
        self._loop_lag = LoopLag()
        self._reward = Reward(engine, concurrency=_GRADERS, label=config.name)
        self._policy: EmbeddedPolicy | None = None
        self._generator: Generator | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, config: RunConfig, model: Path) -> AsyncIterator[Run]:
        chat = Chat(load_tokenizer(model))
        bus = Bus()
        async with open_engine(config.sandbox.kind) as engine, Supervisor(bus) as supervisor:
            run = cls(config, engine, bus, supervisor, chat)
            try:
                await supervisor.start(run._loop_lag)
                await supervisor.start(run._reward)
                yield run
            finally:
                os.close(run._weights)

    @asynccontextmanager
    async def engine_process(self, model: Path, *, learning: bool = True) -> AsyncIterator[EmbeddedPolicy]:
        """The policy and the environment manager that asks it."""
        settings = OpenEngine(
            model=str(model),
            weights_fd=self._weights if learning else None,
            slots=self._slots,
            threads=self.config.model.threads,
            rows=self.config.rollout.concurrency,
        )
        async with open_embedded(settings) as policy:
            self._policy = policy
            manager = EnvManager(
                policy, self._environment, self._chat, self.config.agent, concurrency=self.config.rollout.concurrency
            )
            await self._supervisor.start(manager)
            try:
                yield policy
            finally:
                await self._supervisor.stop(manager)

    @asynccontextmanager
    async def learner_process(self, model: Path) -> AsyncIterator[WorkerProcess]:
        """The learner, and the engine that samples from what it publishes."""
        threads = self.config.model.threads
        settings = OpenLearner(
            model=str(model),
            weights_fd=self._weights,
            slots=self._slots,
            threads=threads,
            algorithm=self.config.algorithm,
            learner=self.config.learner,
            temperature=self.config.rollout.temperature,
        )
        async with WorkerProcess(
            "ale.learner.learner_process",
            error=LearnerError,
            pass_fds=(self._weights,),
            env={"OMP_NUM_THREADS": str(threads)},
        ) as learner:
            await learner.ask(settings, deadline_s=_OPEN_DEADLINE_S)
            async with self.engine_process(model):
                yield learner

    async def warm_start(self, learner: WorkerProcess, source: Source, tell: Report) -> None:
        """Supervised updates on demonstrations (eq. 1), then the weights go to the policy."""
        c = self.config.warm_start
        if c.steps:
            demonstrations = await self._demonstrations(source, tell)
            rng, order = random.Random(self.config.seed), list[Demonstration]()
            for step in range(1, c.steps + 1):
                if len(order) < c.batch:
                    order = rng.sample(demonstrations, len(demonstrations))
                batch = tuple(order.pop() for _ in range(min(c.batch, len(order))))
                rate = c.learning_rate * min(1.0, step / _WARM_UP_STEPS)
                request = Imitate(demonstrations=batch, learning_rate=rate)
                metrics = await learner.ask(request, deadline_s=self.config.learner.step_deadline_s)
                tell(self.progress("warm_start", step, c.steps, {"loss": metrics.loss}))
            await self.policy.load_weights(metrics.version, metrics.slot)
        await learner.ask(StartPolicyOptimization(), deadline_s=self.config.learner.step_deadline_s)

    async def optimise(
        self, learner: WorkerProcess, source: Source, ledger: Ledger, after: Callable[[Update], Awaitable[None]]
    ) -> None:
        """The asynchronous loop: returns after the last update; what was still running is dropped and booked."""
        c = self.config.rollout
        slots = Slots(c.groups_per_step * (c.max_lag + 1))
        async with Supervisor(self._bus) as actors:
            buffer = SampleBuffer(slots, ledger, max_lag=c.max_lag, on_stale=c.on_stale)
            trainer = Trainer(self.config, learner, self.policy, slots, ledger, after)
            await actors.start(buffer)
            self._generator = Generator(self.config, source.train, slots, ledger)
            await actors.start(self._generator)
            await actors.start(trainer)
            await actors.join(trainer)
        ledger.drop_running("end_of_run")

    async def evaluate(
        self, tasks: Sequence[Task], name: str, tell: Report, folder: RunFolder | None = None
    ) -> Rate | None:
        """Success on `tasks`; None when there are none."""
        if not tasks:
            return None
        seen = await evaluate_tasks(
            self._bus, self.config, tasks, name, lambda n: tell(self.progress("evaluate", n, len(tasks), {}))
        )
        result = rate(seen)
        if folder is not None:
            for trajectory in seen:
                folder.keep(trajectory, evaluation=name)
            folder.record(evaluation=name, success=result.success, ci95=result.ci95, n=result.n)
        return result

    async def save(self, learner: WorkerProcess, path: Path) -> None:
        await learner.ask(SaveCheckpoint(path=str(path)), deadline_s=self.config.learner.step_deadline_s)

    @property
    def policy(self) -> EmbeddedPolicy:
        assert self._policy is not None, "engine_process() opens the policy"
        return self._policy

    def load(self) -> dict[str, float]:
        """How rollouts go and how busy the machine is, for the record of an update."""
        return {
            "success": self._generator.recent_success() if self._generator else 0.0,
            "loop_lag_p99_ms": self._loop_lag.quantile_ms(0.99),
            "sandboxes_alive": float(self._engine.statistics().alive),
        }

    def progress(self, phase: Phase, step: int, total: int, values: dict[str, float]) -> Progress:
        busy = (w for w in self._bus.waits() if not w.what.startswith("a message in the inbox"))
        waits = tuple(f"{w.who}: {w.what}" for w in islice(busy, 3))
        return Progress(phase=phase, step=step, total=total, values=values, waits=waits)

    def _environment(self, task: Task) -> Env:
        c = self.config
        return TerminalEnv(
            msgspec.structs.replace(task, memory_mb=min(task.memory_mb, c.sandbox.memory_mb)),
            self._engine,
            lambda task, snapshot: self._reward.ask(self._bus, task, snapshot),
            pids=c.sandbox.pids,
            max_output_chars=c.agent.max_output_chars,
            command_timeout_s=c.agent.command_timeout_s,
            alarms=AlarmRules(**c.sandbox.alarms),
            label=c.name,
        )

    async def _demonstrations(self, source: Source, tell: Report) -> list[Demonstration]:
        """Reference solutions of training tasks, carried out in sandboxes, a fixed number of each family."""
        c = self.config.warm_start
        tasks = choose_demonstrated(source.train, c.demonstrations, c.by_family)
        room = asyncio.Semaphore(self.config.rollout.concurrency)
        done = 0

        async def one(task: Task) -> Demonstration:
            nonlocal done
            async with room:
                shown = await demonstrate(task, self._environment, self._chat, self.config.agent)
            done += 1
            tell(self.progress("warm_start", 0, c.steps, {"demonstrations": done}))
            return shown

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(task), name=f"demonstrate {task.id}") for task in tasks]
        return [task.result() for task in running]


def choose_demonstrated(tasks: Iterator[Task], total: int, by_family: dict[str, int]) -> list[Task]:
    """Tasks to demonstrate, taken off the front of the training stream: `by_family` of each family it names; without
    it, the first `total` that have a solution. Raises `ConfigError` when the stream does not offer them."""
    chosen: list[Task] = []
    left = dict(by_family)
    for looked, task in enumerate(tasks):
        if looked > _LOOK_AT_MOST * max(total, sum(by_family.values())):
            break
        if not task.solution or (by_family and left.get(task.family, 0) < 1):
            continue
        chosen.append(task)
        if by_family:
            left[task.family] -= 1
            if not any(left.values()):
                return chosen
        elif len(chosen) == total:
            return chosen
    missing = ", ".join(f"{n} of {family}" for family, n in left.items() if n) or f"{total - len(chosen)}"
    raise ConfigError(f"warm_start: the tasks offer too few solutions to demonstrate; missing: {missing}.")
