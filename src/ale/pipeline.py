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
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import msgspec

from ale.actors.ledger import Ledger
from ale.actors.trainer import Update
from ale.agent.actions import render
from ale.config import RunConfig
from ale.data.run_folder import RunFolder, versions
from ale.envs.source import Source, open_source
from ale.messages import Trajectory
from ale.models.path import check_model_path
from ale.progress import EvalSummary, Summary
from ale.run import Report, Run

# The tokenizer of a new nano model is trained on the text of this many tasks.
_CORPUS_TASKS = 400


async def train(config: RunConfig, *, report: Report | None = None, overwrite: bool = False) -> Summary:
    """Warm start, evaluate, optimise the policy, evaluate. Everything lands in the run folder. Raises `UserError`."""
    began = time.monotonic()
    tell = report or (lambda progress: None)
    source = open_source(config.tasks, config.seed)
    with RunFolder(config, overwrite=overwrite) as folder:
        model = await _model_directory(config, source, folder.model)
        async with Run.open(config, model) as run, run.learner_process(model) as learner:
            await run.warm_start(learner, source, tell, folder)
            before = await run.evaluate(source.heldout, "heldout_before", tell, folder)
            families_before = await run.evaluate(source.families, "families_before", tell, folder)
            ledger, lag_seen, tokens = Ledger(), 0, 0
            training = time.monotonic()

            async def after(update: Update) -> None:
                nonlocal lag_seen, tokens
                lag_seen = max(lag_seen, update.lag)
                members = [t for g in update.batch.groups for t in g.trajectories]
                tokens += sum(t.action_tokens for t in members)
                for t in members:
                    folder.keep(t, update=update.number)
                values = _values(update, members) | run.load()
                folder.record(update=update.number, **values, ledger=msgspec.to_builtins(ledger.statistics()))
                tell(run.progress("train", update.number, config.learner.updates, values))
                if config.learner.checkpoint_every and update.number % config.learner.checkpoint_every == 0:
                    await run.save(learner, folder.checkpoint(str(update.number)))
                if config.eval.every and update.number % config.eval.every == 0:
                    await run.evaluate(source.heldout, f"heldout_{update.number}", tell, folder)

            await run.optimise(learner, source, ledger, after)
            trained_s = time.monotonic() - training
            await run.save(learner, folder.checkpoint("final"))
            heldout_after = await run.evaluate(source.heldout, "heldout_after", tell, folder)
            families_after = await run.evaluate(source.families, "families_after", tell, folder)
        assert before is not None
        assert heldout_after is not None
        books = ledger.statistics()
        summary = Summary(
            name=config.name,
            seed=config.seed,
            updates=config.learner.updates,
            heldout_before=before,
            heldout_after=heldout_after,
            heldout_families_before=families_before,
            heldout_families_after=families_after,
            wall_s=time.monotonic() - began,
            episodes=books.started,
            tokens_per_s=tokens / trained_s if trained_s else 0.0,
            max_lag_seen=lag_seen,
            max_lag_allowed=config.rollout.max_lag,
            lost_samples=books.lost,
            dropped_by_reason=books.dropped,
            versions=versions(),
        )
        folder.finish(summary)
    return summary


async def evaluate(config: RunConfig, model_path: str, *, report: Report | None = None) -> EvalSummary:
    """Held-out success of a model on disk. Raises `UserError`."""
    began = time.monotonic()
    tell = report or (lambda progress: None)
    source = open_source(config.tasks, config.seed)
    model = check_model_path(model_path)
    async with Run.open(config, model) as run, run.engine_process(model, learning=False):
        heldout = await run.evaluate(source.heldout, "heldout", tell)
        families = await run.evaluate(source.families, "families", tell)
    assert heldout is not None
    return EvalSummary(
        name=config.name,
        seed=config.seed,
        model=str(model),
        heldout=heldout,
        heldout_families=families,
        wall_s=time.monotonic() - began,
        versions=versions(),
    )


async def _model_directory(config: RunConfig, source: Source, target: Path) -> Path:
    """The model to start from: the configured one, or a new nano model whose tokenizer knows the training tasks."""
    if config.model.path != "nano":
        return check_model_path(config.model.path)
    from ale.models.nano import save_nano

    texts = list[str]()
    for task in islice(source.train, _CORPUS_TASKS):
        texts += [
            task.instruction,
            *map(render, task.solution),
            *(f.data.decode("utf-8", "replace") for f in task.files),
        ]
    await asyncio.to_thread(save_nano, target, texts, seed=config.seed)
    return target


def _values(update: Update, members: Sequence[Trajectory]) -> dict[str, float]:
    m = update.metrics
    return m.values | {
        "batch_reward": sum(t.reward or 0.0 for t in members) / len(members),
        "loss": m.loss,
        "grad_norm": m.grad_norm,
        "lag": float(update.lag),
        "wait_s": update.wait_s,
        "step_s": update.step_s,
        "sync_s": update.sync_s,
    }
