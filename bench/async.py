"""Asynchronous against synchronous training where environments have a long tail: episodes per hour, held-out success.

    python -m bench.async                        about 20 minutes on two cores
    python -m bench.async --model M --seeds 0    from a model that is warm already; one pair
    python -m bench.async --smoke                whether it runs: a few updates of one seed, no figures written

The nano job of `examples/nano.toml`, from one warm-started model, with the same batch (32), places for episodes (32),
cores and engine in every mode:

    sync               max_lag 0: an update waits for its whole batch; trajectories overlap within it
    async              max_lag 2
    async_redundant    the same, eight groups more than needed, and stragglers ended at eight times the median
    sync_redundant     max_lag 0, sixteen groups more than needed

What differs from the plain job is the environment: the first command of an episode takes a lognormal time, median
0.75 s and p99 over p50 of 20 (1.7 s in the mean), and 2% of them end with a crashed sandbox. It is most of an episode's
time, as in agentic RL. Held-out tasks are played without it, after the same number of updates. Each seed is one pair of
each mode with `sync`.

An episode counts when it ended by itself: what was ended as redundant, straggling or stale, or came too late, does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from ale.config import RunConfig
from ale.config_file import load
from ale.envs.env import Env, Step
from ale.envs.grade import grade
from ale.envs.source import open_source
from ale.envs.terminal import TerminalEnv
from ale.errors import SandboxError
from ale.messages import Score
from ale.pipeline import train
from ale.progress import Summary
from ale.sandbox import SandboxEngine, Snapshot, open_engine
from ale.task import Task
from bench.harness import ROOT, Benchmark, Row, benchmark, commit, machine

MEDIAN_S, TAIL, CRASHES = 0.75, 20.0, 0.02
SIGMA = math.log(TAIL) / statistics.NormalDist().inv_cdf(0.99)
MODES = {
    "sync": ("rollout.max_lag=0",),
    "async": ("rollout.max_lag=2",),
    "async_redundant": ("rollout.max_lag=2", "rollout.extra_groups=8", "rollout.straggler_factor=8"),
    "sync_redundant": ("rollout.max_lag=0", "rollout.extra_groups=16"),
}
SKIPPED = 2  # updates that no figure counts: the pipeline fills up
GRADERS = 4
NOT_BY_THEMSELVES = ("redundant", "straggler", "stale")


class Size(msgspec.Struct, frozen=True):
    """How much of it is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int = 8
    heldout: int = 200
    warm: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


SMOKE = Size(
    seeds=(0,),
    updates=3,
    heldout=10,
    warm=("warm_start.steps=250", "warm_start.stop_at=0.1"),
    job=("rollout.groups_per_step=4", "rollout.concurrency=8"),
)


class Measured(msgspec.Struct, frozen=True):
    """One run: episodes and updates per hour, held-out success, and what stood idle."""

    episodes: float
    updates: float
    success: float
    trainer_idle: float
    places_idle: float
    engine_idle: float


class Meter:
    """Seconds that places for training episodes were taken."""

    def __init__(self) -> None:
        self.taken = 0
        self.seconds = 0.0
        self._since = time.monotonic()

    def change(self, by: int) -> None:
        now = time.monotonic()
        self.seconds += self.taken * (now - self._since)
        self._since = now
        self.taken += by


class LongTailed:
    """An environment whose first command takes its time, or crashes."""

    def __init__(self, inner: Env, rng: random.Random, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter
        self._delay_s = MEDIAN_S * math.exp(SIGMA * rng.gauss(0, 1))
        self._crashes = rng.random() < CRASHES
        self._first, self._open = True, False

    async def reset(self) -> str:
        self._open = True
        self._meter.change(1)
        return await self._inner.reset()

    async def step(self, action: str) -> Step:
        if self._first:
            self._first = False
            await asyncio.sleep(self._delay_s)
            if self._crashes:
                raise SandboxError("crashed, as the benchmark says")
        return await self._inner.step(action)

    async def score(self) -> Score:
        return await self._inner.score()

    async def close(self) -> None:
        if self._open:
            self._open = False
            self._meter.change(-1)
        await self._inner.close()


class Places:
    """Makes the environments of one run."""

    def __init__(self, config: RunConfig, engine: SandboxEngine) -> None:
        self._config = config
        self._engine = engine
        self._graders = asyncio.Semaphore(GRADERS)
        self._made = 0
        self.meter = Meter()

    def make(self, task: Task) -> Env:
        c = self._config
        env = TerminalEnv(
            msgspec.structs.replace(task, memory_mb=min(task.memory_mb, c.sandbox.memory_mb)),
            self._engine,
            self._grade,
            pids=c.sandbox.pids,
            max_output_chars=c.agent.max_output_chars,
            command_timeout_s=c.agent.command_timeout_s,
        )
        if task.split != "train":
            return env
        self._made += 1
        return LongTailed(env, random.Random(f"{c.seed}/{task.id}/{self._made}"), self.meter)

    async def _grade(self, task: Task, snapshot: Snapshot) -> Score:
        async with self._graders:
            return await grade(self._engine, task, snapshot)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="bench.async")
    arguments.add_argument("--smoke", action="store_true")
    arguments.add_argument("--model", type=Path, help="a warm-started model; without it one is made")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--modes", choices=list(MODES), nargs="+", default=list(MODES), help="sync among them")
    chosen = arguments.parse_args()
    if "sync" not in chosen.modes and not chosen.smoke:
        arguments.error("--modes: every row is a comparison with sync")
    size = SMOKE if chosen.smoke else Size(seeds=tuple(chosen.seeds))
    with tempfile.TemporaryDirectory() as folder:
        if chosen.model is None:
            warm = configured(folder, "warm", size, "learner.updates=0", *size.warm)
            print(f"warm start: {asyncio.run(train(warm)).heldout_after}", flush=True)
            chosen.model = Path(folder) / "warm" / "checkpoints" / "final"
        model = f"model.path={chosen.model.resolve()}"
        measured: dict[str, list[Measured]] = {mode: [] for mode in chosen.modes}

        def job(mode: str, seed: int) -> None:
            config = configured(
                folder,
                f"{mode}-{seed}",
                size,
                model,
                "warm_start.steps=0",
                f"learner.updates={size.updates}",
                f"seed={seed}",
                *MODES[mode],
            )
            summary, seconds = asyncio.run(played(config))
            measured[mode].append(figures(Path(folder) / config.name, config, summary, seconds))
            print(f"{config.name}: {measured[mode][-1]}; {summary.dropped_by_reason}", flush=True)
            if summary.lost_samples or summary.max_lag_seen > config.rollout.max_lag:
                raise SystemExit(f"bench async: {config.name} broke its books or its bound: {summary}")

        for number, seed in enumerate(size.seeds):
            for mode in measured if number % 2 == 0 else reversed(measured):
                job(mode, seed)
        if chosen.smoke:
            return
        with benchmark("async", pairs=len(size.seeds)) as bench:
            rows(bench, measured)


def configured(folder: str, name: str, size: Size, *overrides: str) -> RunConfig:
    return load(
        ROOT / "examples" / "nano.toml",
        [
            f"runs_dir={folder}",
            f"name={name}",
            f"tasks.heldout={size.heldout}",
            "tasks.families=0",
            "rollout.concurrency=32",
            *size.job,
            *overrides,
        ],
    )


async def played(config: RunConfig) -> tuple[Summary, float]:
    """A run in the slow environments, and the seconds that its places were taken in the measured updates."""
    async with open_engine("local", label="bench async") as engine:
        places = Places(config, engine)
        source = open_source(config.tasks, config.seed)
        marks: list[float] = []

        async def watch(update: Any) -> None:
            places.meter.change(0)
            marks.append(places.meter.seconds)

        summary = await train(config, source=msgspec.structs.replace(source, make_env=places.make), watch=watch)
        return summary, marks[-1] - marks[SKIPPED - 1]


def figures(path: Path, config: RunConfig, summary: Summary, taken_s: float) -> Measured:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "update" in line]
    first, last, counted = updates[SKIPPED - 1], updates[-1], updates[SKIPPED:]
    seconds = sum(x["wait_s"] + x["step_s"] + x["sync_s"] for x in counted)
    assert summary.heldout_after is not None
    return Measured(
        episodes=(ended(last) - ended(first)) / seconds * 3600,
        updates=len(counted) / seconds * 3600,
        success=summary.heldout_after.success,
        trainer_idle=sum(x["wait_s"] for x in counted) / seconds,
        places_idle=max(0.0, 1 - taken_s / (seconds * config.rollout.concurrency)),
        engine_idle=max(0.0, 1 - (last["engine_s"] - first["engine_s"]) / seconds),
    )


def ended(line: dict[str, Any]) -> int:
    """Episodes that came to their own end up to this update."""
    books = line["ledger"]
    return int(books["trained"]) + sum(n for r, n in books["dropped"].items() if r not in NOT_BY_THEMSELVES)


def rows(bench: Benchmark, measured: dict[str, list[Measured]]) -> None:
    def row(name: str, unit: str, mode: str, field: str, against: str | None = "sync") -> None:
        mine = [float(getattr(m, field)) for m in measured[mode]]
        theirs = [float(getattr(m, field)) for m in measured[against]] if against else []
        ratios = [a / b for a, b in zip(mine, theirs, strict=True) if b] if against else []
        bench.rows.append(
            Row(
                name=name,
                value=statistics.fmean(mine),
                unit=unit,
                baseline=against and MODES[against][0].replace("rollout.", "").replace("=", " "),
                baseline_value=statistics.fmean(theirs) if against else None,
                ratio=statistics.median(ratios) if ratios else None,
                spread=(min(ratios or mine), max(ratios or mine)),
                commit=commit(),
                machine=machine(),
            )
        )

    others = [mode for mode in measured if mode != "sync"]
    for mode in others:
        row(f"{mode}_over_sync", "episodes/hour", mode, "episodes")
    for mode in others:
        row(f"{mode}/updates", "updates/hour", mode, "updates")
    for mode in others:
        row(f"{mode}/heldout", "held-out success", mode, "success")
    for mode in measured:
        for part in ("trainer", "places", "engine"):
            row(f"bubble/{mode}/{part}", "share idle", mode, f"{part}_idle", None)


if __name__ == "__main__":
    main()
