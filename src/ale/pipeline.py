"""The whole loop, wired. This file sees everything and is seen by none: read it to know what a run is.

    tasks -> Generator -- Group --> SampleBuffer -- Batch --> Trainer -> new weights -> Policy
                |   ^                                           |
        Rollout v   | Trajectory                                +-> gives its slots back
              EnvManager -> Sandbox, Policy, Reward

What it wires is opened by `run.py`; the actors are in `actors/`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ale.actors.ledger import Ledger
from ale.actors.stop import Stop
from ale.actors.trainer import Update
from ale.agent.actions import render
from ale.agent.episode import Judge
from ale.config import RunConfig
from ale.data.books import Books
from ale.data.events import Recorded
from ale.data.instruments import prometheus
from ale.data.run_folder import RunFolder, summary_of, versions
from ale.data.task_stream import TaskStream
from ale.envs.source import Source, open_source
from ale.errors import ConfigError, Interrupted
from ale.models.path import check_model_path
from ale.progress import EvalSummary, Rate, Summary
from ale.proxy.script import lines
from ale.run import Report, Run
from ale.task import Task
from ale.waiting import recorded
from ale.warm_start import warm_start

# The tokenizer of a new nano model is trained on the text of this many tasks.
_CORPUS_TASKS = 400


async def train(
    config: RunConfig,
    *,
    report: Report | None = None,
    overwrite: bool = False,
    resume: bool = False,
    stop: Stop | None = None,
    source: Source | None = None,
    judge: Judge | None = None,
    watch: Callable[[Update], Coroutine[Any, Any, None]] | None = None,
    stuck: Callable[[str], None] | None = None,
) -> Summary:
    """Warm start, evaluate, optimise the policy, evaluate. Everything lands in the run folder.

    `resume` goes on with what is in the folder: see docs/runs.md. Raises `UserError`, and `Interrupted` when `stop` was
    requested and the run has come to a checkpoint. `source` and `judge` replace what the configuration names; `watch`
    sees each update, recorded, before the next begins (`ale.open_run` is made of them). `stuck` ends the process when
    its event loop stands still (`Watchdog`).
    """
    tell = report or (lambda progress: None)
    source = source or open_source(config.tasks, config.seed)  # what is wrong there makes no folder
    with RunFolder(config, overwrite=overwrite, resume=resume) as folder, _served(folder, config):
        done = summary_of(folder.path)
        if done is not None and done.updates == config.learner.updates:
            return done
        folder.forget_moment()
        try:
            with recorded(folder.timeline.span):
                summary = await _train(config, folder, source, judge, stop or Stop(), tell, watch, stuck)
            folder.end("done")
            return summary
        except Interrupted as error:
            folder.end("stopped on request")
            raise Interrupted(
                f"The run was stopped after update {folder.books.updates}; nothing that had finished is lost. "
                f"Go on with: ale train {folder.path} --resume"
            ) from error
        except asyncio.CancelledError:  # whoever embeds it has left it
            folder.end("left before its end")
            raise
        except Exception as error:
            folder.end(f"{type(error).__name__}: {error}")
            raise


async def _train(
    config: RunConfig,
    folder: RunFolder,
    source: Source,
    judge: Judge | None,
    stop: Stop,
    tell: Report,
    watch: Callable[[Update], Coroutine[Any, Any, None]] | None,
    stuck: Callable[[str], None] | None,
) -> Summary:
    recording = folder.recording
    tasks = TaskStream(source.train, None if recording is None else recording.task)
    ledger = Ledger(folder.books, folder.journal.write)
    books, updates = ledger.books, config.learner.updates
    model = await _model_directory(config, tasks, folder.model)
    state = folder.checkpoint.learner if folder.checkpoint is not None else None
    opened = Run.open(
        config,
        model,
        make_env=source.make_env,
        judge=judge,
        stop=stop,
        tape=recording,
        keep=folder.keep_moment,
        stuck=stuck,
    )
    async with opened as run, run.learner_process(model, state) as learner:
        run.follow(tell)

        async def evaluate_once(name: str, update: int) -> tuple[Rate | None, Rate | None]:
            heldout = await run.evaluate_once(source.heldout, f"heldout_{name}", update, tell, folder, ledger)
            families = await run.evaluate_once(source.families, f"families_{name}", update, tell, folder, ledger)
            return heldout, families

        def record(update: Update) -> dict[str, float]:
            for t in update.trajectories:
                folder.keep(t, update=update.number)
            seen = ledger.statistics()
            ended = {"success": ledger.recent_success(), "episodes": float(seen.started - seen.running)}
            values = _values(update) | ended | run.load() | run.components()
            folder.record(update=update.number, **values, ledger=msgspec.to_builtins(seen))
            ledger.book(Recorded(update=update.number, sizes=folder.sizes))
            tell(run.progress("train", update.number, updates, values))
            return values

        async def evaluate_at(number: int) -> None:
            name, beside = f"heldout_{number}", config.eval.beside
            await run.evaluate_once(source.heldout, name, number, tell, folder, ledger, beside=beside)

        async def at(number: int) -> None:
            """What is due after this update. A resumed run passes here again, and does what had not been done."""
            if books.since and (number % config.learner.checkpoint_every == 0 or number == updates):
                await run.checkpoint(learner, folder, ledger)
            if config.learner.export_every and number % config.learner.export_every == 0:
                await run.export(learner, folder.export(str(number)))
            if config.eval.every and number % config.eval.every == 0:
                if config.eval.beside:
                    evaluator.due(number)
                else:
                    await evaluate_at(number)

        async def after(update: Update) -> None:
            values = record(update)
            await at(update.number)
            if watch is not None:
                await stop.unless(watch(msgspec.structs.replace(update, values=values)))

        await run.catch_up(learner, ledger, tell)
        try:
            await warm_start(run, learner, source, tasks, tell, folder, ledger)
            before, families_before = await evaluate_once("before", 0)
            if books.recorded < books.updates:
                record(Update.of(books.since[-1]))
            async with run.evaluator(evaluate_at) as evaluator:
                if config.eval.beside:
                    for number in missing_evaluations(config, books):
                        evaluator.due(number)
                if books.updates:
                    await at(books.updates)
                await run.optimise(learner, tasks, folder, ledger, after)
                await stop.unless(evaluator.drained())
            await run.export(learner, folder.export("final"))
            heldout_after, families_after = await evaluate_once("after", updates)
        except Interrupted:
            await run.checkpoint(learner, folder, ledger)
            raise
    end = ledger.at_the_end()
    summary = Summary(
        name=config.name,
        seed=config.seed,
        updates=updates,
        heldout_before=before,
        heldout_after=heldout_after,
        heldout_families_before=families_before,
        heldout_families_after=families_after,
        wall_s=folder.journal.elapsed_s,
        episodes=end.started,
        tokens_per_s=books.tokens / books.training_s if books.training_s else 0.0,
        max_lag_seen=books.max_lag,
        max_lag_allowed=config.rollout.max_lag,
        lost_samples=end.lost,
        dropped_by_reason=end.dropped,
        lives=books.lives,
        restarted=books.restarted,
        versions=versions(),
    )
    folder.finish(summary)
    return summary


def missing_evaluations(config: RunConfig, books: Books) -> list[int]:
    """The updates whose evaluation beside training was cut off, or had not begun, when the run's last life ended."""
    every = config.eval.every
    due = range(every, books.updates + 1, every) if every else ()
    return [number for number in due if f"heldout_{number}@{number}" not in books.rates]


async def evaluate(config: RunConfig, model_path: str, *, report: Report | None = None) -> EvalSummary:
    """Held-out success of a model on disk. Raises `UserError`."""
    began = time.monotonic()
    tell = report or (lambda progress: None)
    source = open_source(config.tasks, config.seed)
    if not source.heldout:
        raise ConfigError("tasks.heldout is 0: there is nothing to evaluate on.")
    model = check_model_path(model_path)
    opened = Run.open(config, model, make_env=source.make_env)
    async with opened as run, run.engine_process(model):
        run.follow(tell)
        heldout, _ = await run.evaluate(source.heldout, "heldout", tell)
        families = (await run.evaluate(source.families, "families", tell))[0] if source.families else None
    return EvalSummary(
        name=config.name,
        seed=config.seed,
        model=str(model),
        heldout=heldout,
        heldout_families=families,
        wall_s=time.monotonic() - began,
        versions=versions(),
    )


def _served(folder: RunFolder, config: RunConfig) -> AbstractContextManager[object]:
    port = config.metrics.prometheus_port
    return prometheus(folder.page, port) if port else nullcontext()


async def _model_directory(config: RunConfig, tasks: Iterator[Task], target: Path) -> Path:
    """The model to start from: the configured one, or a new nano model whose tokenizer knows the training tasks."""
    if config.model.path != "nano":
        return check_model_path(config.model.path)
    corpus = list(islice(tasks, _CORPUS_TASKS))
    if not target.is_dir():  # noqa: ASYNC240  a stat, once
        from ale.models.nano import save_nano

        texts = list[str]()
        for task in corpus:
            texts += [
                task.instruction,
                *_said(task, config),
                *(f.data.decode("utf-8", "replace") for f in task.files),
            ]
        unfinished = target.with_name(".model.new")
        await asyncio.to_thread(save_nano, unfinished, texts, seed=config.seed)
        unfinished.rename(target)
    return target


def _said(task: Task, config: RunConfig) -> Sequence[str]:
    """What is said in a demonstration of the task."""
    if config.agent.kind == "builtin":
        return [render(action, task.actions) for action in task.solution]
    return lines(task, config.warm_start, "tags" if config.agent.tool_syntax == "tags" else "fence")


def _values(update: Update) -> dict[str, float]:
    m, members = update.metrics, update.trajectories
    return m.values | {
        "batch_reward": sum(t.reward or 0.0 for t in members) / len(members),
        "loss": m.loss,
        "grad_norm": m.grad_norm,
        "lag": float(update.lag),
        "wait_s": update.wait_s,
        "step_s": update.step_s,
        "sync_s": update.sync_s,
        "trainer_bubble": update.wait_s / max(update.wait_s + update.step_s + update.sync_s, 1e-9),
    }
