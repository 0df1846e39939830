"""The warm start: supervised updates on demonstrations, until the policy solves enough of other tasks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from ale.actors.ledger import Ledger
from ale.config import WarmStartConfig
from ale.data.events import TasksShown
from ale.data.run_folder import RunFolder
from ale.data.task_stream import TaskStream
from ale.envs.source import Source
from ale.errors import ConfigError, first_error
from ale.messages import Demonstration, Imitate, StartPolicyOptimization
from ale.process import WorkerProcess
from ale.progress import Rate
from ale.run import Demonstrate, Report, Run
from ale.task import Task
from ale.waiting import progressed

# How often, and on how many training tasks, the warm start looks whether `stop_at` is reached: less often while it is
# not even halfway there, for a look costs as much as several steps.
_EVERY = 10
_EVERY_FAR = 40
_TASKS = 64
_NAME = "warm_start_check_"
# Tasks looked at for each demonstration wanted, before the stream is said to lack them.
_LOOK_AT_MOST = 50
# The first steps are smaller.
_WARM_UP_STEPS = 20


class Checks:
    """When to look, and whether `stop_at` is reached; never when that is 0. `seen`: the success of earlier
    looks, by step."""

    def __init__(self, stop_at: float, seen: Mapping[int, float]) -> None:
        self._stop_at = stop_at
        self._seen = dict(seen)

    @staticmethod
    def name(step: int) -> str:
        """That of the evaluation."""
        return f"{_NAME}{step}"

    @classmethod
    def of(cls, stop_at: float, rates: Mapping[str, Rate]) -> Checks:
        """Those of a run whose evaluations so far are `rates`, by `NAME@UPDATE`."""
        seen = {key.partition("@")[0]: rate for key, rate in rates.items() if key.startswith(_NAME)}
        return cls(stop_at, {int(name.removeprefix(_NAME)): rate.success for name, rate in seen.items()})

    def due(self, step: int) -> bool:
        """A resumed run passes the steps of its earlier looks again, and gets the same answers."""
        if not self._stop_at:
            return False
        last = max((before for before in self._seen if before < step), default=0)
        near = self._seen.get(last, 0.0) >= self._stop_at / 2
        return step - last >= (_EVERY if near else _EVERY_FAR)

    def reached(self, step: int, success: float) -> bool:
        self._seen[step] = success
        return success >= self._stop_at


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


def imitation(config: WarmStartConfig, seed: int, demonstrations: Sequence[Demonstration]) -> Iterator[Imitate]:
    """The supervised updates of a warm start, one after the other: every demonstration once before any comes again."""
    rng, order = random.Random(seed), list[Demonstration]()
    for step in range(1, config.steps + 1):
        if len(order) < config.batch:
            order = rng.sample(demonstrations, len(demonstrations))
        yield Imitate(
            demonstrations=tuple(order.pop() for _ in range(min(config.batch, len(order)))),
            learning_rate=config.learning_rate * min(1.0, step / _WARM_UP_STEPS),
            weight_decay=config.weight_decay,
        )


async def warm_start(
    run: Run,
    learner: WorkerProcess,
    source: Source,
    tasks: TaskStream,
    tell: Report,
    folder: RunFolder,
    ledger: Ledger,
) -> None:
    """Supervised updates on demonstrations (eq. 1), then the weights go to the policy. Nothing where that is over;
    from the checkpoint's step on where it was cut off."""
    c, books = run.config.warm_start, ledger.books
    if books.warm:
        return
    if c.steps:
        if books.demonstrations is None:
            shown = await run.stop.unless(_demonstrations(run, tasks, tell))
            looked_at = tuple(islice(tasks, _TASKS)) if c.stop_at else ()
            ledger.book(TasksShown(drawn=tasks.drawn, demonstrations=tuple(shown), looked_at=len(looked_at)))
        else:
            await asyncio.to_thread(tasks.go_to, books.drawn - books.looked_at, {})
            looked_at = tuple(islice(tasks, books.looked_at))
        checks = Checks.of(c.stop_at, books.rates)
        for step, request in enumerate(imitation(c, run.config.seed, books.demonstrations or ()), start=1):
            if step < books.warm_steps:
                continue
            check = checks.due(step)
            evaluation = c.eval_every > 0 and step % c.eval_every == 0
            if step > books.warm_steps:
                run.stop.check()
                metrics = await learner.ask(request, deadline_s=run.config.learner.step_deadline_s)
                books.warm_steps = step
                progressed(f"step {step} of the warm start")
                tell(run.progress("warm_start", step, c.steps, {"loss": metrics.loss}))
                if check or evaluation or step == c.steps:
                    await run.policy.load_weights(metrics.version, metrics.slot)
            if evaluation:
                await run.evaluate_once(source.heldout, f"warm_start_{step}", 0, tell, folder, ledger)
            if check:
                seen = await run.evaluate_once(looked_at, checks.name(step), 0, tell, folder, ledger)
                if seen is not None and checks.reached(step, seen.success):
                    break
    await learner.ask(StartPolicyOptimization(), deadline_s=run.config.learner.step_deadline_s)
    books.warm, books.demonstrations = True, ()
    await run.checkpoint(learner, folder, ledger)


async def _demonstrations(run: Run, stream: TaskStream, tell: Report) -> list[Demonstration]:
    """Reference solutions of training tasks, carried out in sandboxes, a fixed number of each family."""
    c = run.config.warm_start
    tasks = choose_demonstrated(stream, c.demonstrations, c.by_family)
    room = asyncio.Semaphore(run.config.rollout.concurrency)
    done = 0

    async def one(show: Demonstrate, task: Task) -> tuple[Demonstration, ...]:
        nonlocal done
        async with room:
            shown = await show(task)
        done += 1
        progressed(f"{done} demonstrations")
        tell(run.progress("warm_start", 0, c.steps, {"demonstrations": done}))
        return shown

    try:
        async with run.demonstrator() as show, asyncio.TaskGroup() as group:
            running = [group.create_task(one(show, task), name=f"demonstrate {task.id}") for task in tasks]
    except ExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
    return [shown for task in running for shown in task.result()]
