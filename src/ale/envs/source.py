"""Where a run's tasks come from: the procedural families, a directory of task directories, or an adapter's package."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ale.config import TasksConfig
from ale.envs.env import MakeEnv
from ale.envs.families import make_splits
from ale.envs.task_dir import load_tasks
from ale.errors import ConfigError
from ale.hub import Hub
from ale.task import Task


class Source(msgspec.Struct, frozen=True):
    """`heldout` and `families` are never drawn by `train`, an iterator that may be endless.

    `make_env` makes the environments that the tasks are played in; None: sandboxes, as the tasks say.
    """

    train: Iterator[Task]
    heldout: tuple[Task, ...]
    families: tuple[Task, ...] = ()
    make_env: MakeEnv | None = None


def open_source(config: TasksConfig, seed: int) -> Source:
    """The tasks of a configuration; `seed` orders those for training. Raises `ConfigError` and `TaskFormatError`."""
    if config.source == "procedural":
        splits = make_splits(config.heldout, config.families, config.seed, config.only)
        return Source(train=splits.train(seed), heldout=splits.heldout, families=splits.families)
    if config.source.startswith("gem:"):
        from ale.envs.gem import open_gem

        return open_gem(config, seed)
    if config.source == "human-eval":
        from ale.envs.human_eval import open_human_eval

        return open_human_eval(config, seed)
    if config.source.startswith("hub:"):
        directory = Hub.default().tasks(config.source.removeprefix("hub:"))
    else:
        directory = Path(config.source).expanduser()
    if not directory.is_dir():
        raise ConfigError(
            f"tasks.source: there is no directory {directory}. Give a directory of task directories, "
            '"procedural", "human-eval", "hub:" and a task pack, or "gem:" and an environment.'
        )
    return split(_distinct(load_tasks(directory)), config, seed, where=str(directory))


def split(tasks: list[Task], config: TasksConfig, seed: int, *, where: str) -> Source:
    """`config.heldout` of the tasks held out, the others for training. `where` they came from is named in errors."""
    tasks = list(tasks)
    random.Random(config.seed).shuffle(tasks)
    if len(tasks) <= config.heldout:
        raise ConfigError(
            f"tasks.heldout is {config.heldout}, but {where} holds {len(tasks)} different tasks: "
            "none would be left to train on."
        )
    heldout = tuple(msgspec.structs.replace(t, split="heldout") for t in tasks[: config.heldout])
    train = [msgspec.structs.replace(t, split="train") for t in tasks[config.heldout :]]
    return Source(train=_endless(train, seed), heldout=heldout)


def _endless(tasks: list[Task], seed: int) -> Iterator[Task]:
    """Every task once in each round, in an order of its own."""
    rng = random.Random(f"train/{seed}")
    while True:
        yield from rng.sample(tasks, len(tasks))


def _distinct(tasks: list[Task]) -> list[Task]:
    """One task for each content: a copy under another name must not stand in two splits."""
    return list({task.content_hash: task for task in tasks}.values())
