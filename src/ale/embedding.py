"""A run inside your own program: your environment, your reward, your model; the updates come to an `async for`.

    async with ale.open_run(config, environment=Guess) as run:
        async for update in run.updates():
            print(update.number, update.values["success"])
    print(run.summary)

The run is a task of the event loop that is there already (a notebook's, a server's); models compute in processes of
their own. Leaving the `async with` early stops everything in reverse order and waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ale.config import RunConfig
from ale.envs.own import Environment, RewardFunction, own_reward, own_source
from ale.errors import UserError
from ale.messages import Trajectory
from ale.models.path import check_model_path
from ale.progress import Progress, Summary
from ale.task import Task
from ale.waiting import held_up

if TYPE_CHECKING:
    from ale.actors.trainer import Update

_TRAIN_EXTRA = {"torch", "transformers", "tokenizers", "safetensors", "tensorboardX"}


class Training:
    """A run that goes on. `updates()` or `trajectories()` drives it: an update begins when it is asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.runs_dir) / config.name
        self._task: asyncio.Task[Summary] | None = None
        # One update is handed over at a time: the pipeline offers it and goes on when the next one is asked for.
        self._update: Update | None = None
        self._seen = False
        self._changed = asyncio.Event()
        self._asked = asyncio.Event()

    @property
    def summary(self) -> Summary | None:
        """What summary.json says; None until the run is through, its last evaluation included."""
        task = self._task
        ended = task is not None and task.done() and not task.cancelled()
        return task.result() if task is not None and ended and task.exception() is None else None

    async def updates(self) -> AsyncIterator[Update]:
        """Every update, recorded and live. The next begins when this one is done with, so the weights stand still in
        the body of the loop; rollouts go on. After the last come its evaluation and checkpoint, then the end.

        Raises what stopped the run. A second `updates()` goes on after the first.
        """
        while (update := await self._next()) is not None:
            yield update

    async def trajectories(self) -> AsyncIterator[Trajectory]:
        """Every trajectory that was trained on, update after update."""
        async for update in self.updates():
            for trajectory in update.trajectories:
                yield trajectory

    def _begin(self, work: Coroutine[Any, Any, Summary]) -> asyncio.Task[Summary]:
        self._task = asyncio.create_task(work, name=f"run {self.config.name}")
        self._task.add_done_callback(lambda task: self._changed.set())
        return self._task

    async def _next(self) -> Update | None:
        assert self._task is not None
        if self._seen:
            self._update, self._seen = None, False
            self._asked.set()
        while self._update is None and not self._task.done():
            self._changed.clear()
            await self._changed.wait()
        if self._update is None:
            self._task.result()
            return None
        self._seen = True
        return self._update

    async def _watch(self, update: Update) -> None:
        self._asked.clear()
        self._update = update
        self._changed.set()
        with held_up("whoever embeds the run", release="their asking for the next update, or leaving the run"):
            await self._asked.wait()


@asynccontextmanager
async def open_run(
    config: RunConfig,
    *,
    environment: Callable[[Task], Environment] | None = None,
    reward: RewardFunction | None = None,
    tasks: Iterable[Task] | None = None,
    report: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> AsyncIterator[Training]:
    """Trains as `ale train` does, folder and all, in the event loop that is running.

    `environment(task)` makes the environment of one episode; each turn is an action, whole. Without it the agent works
    in a sandbox. `reward(trajectory)` replaces the environment's score or the task's tests. `tasks` replace the
    configured ones; an environment without tasks gets numbers (`task.seed`). `report` hears of the warm start and of
    evaluations too. `overwrite` and `resume` are those of `ale train`: a run that was left early can be resumed.

    Raises `UserError` for what the caller can mend, on entering or in the loop.
    """
    source = own_source(tasks, environment, config.tasks, config.seed)
    pipeline = await asyncio.to_thread(load_pipeline, config)  # seconds, the first time: torch
    run = Training(config)
    task = run._begin(
        pipeline.train(
            config,
            report=report,
            overwrite=overwrite,
            resume=resume,
            source=source,
            judge=None if reward is None else own_reward(reward),
            watch=run._watch,
        )
    )
    try:
        yield run
    finally:
        task.cancel()
        await _ended(task)
    if not task.cancelled():
        task.result()  # what stopped it, if nobody has asked yet


def load_pipeline(config: RunConfig) -> ModuleType:
    """The module `ale.pipeline`. It loads torch, so what can be refused without it is refused first, as `UserError`."""
    if config.model.path != "nano":
        check_model_path(config.model.path)
    try:
        from ale import pipeline
    except ModuleNotFoundError as error:
        if error.name not in _TRAIN_EXTRA:
            raise
        raise UserError(
            f"{error.name} is not installed, which training needs: pip install torch==2.13.0, then "
            "pip install 'ale[train]'."
        ) from error
    return pipeline


async def _ended(task: asyncio.Task[Summary]) -> None:
    """Waits for the end of a cancelled task, whatever happens meanwhile: all that it holds open has a deadline."""
    interrupted = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            interrupted = True
    if not task.cancelled():
        task.exception()  # asked for: an error of the body that comes first is no reason to log this one
    if interrupted:
        raise asyncio.CancelledError
