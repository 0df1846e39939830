"""The real loop around a simulated node, on the virtual clock."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator

import msgspec

from ale.actors.episodes import Episodes
from ale.actors.generator import Generator
from ale.actors.ledger import Ledger
from ale.actors.multiplexer import Devices, Pool, open_devices
from ale.actors.sample_buffer import SampleBuffer
from ale.actors.slots import Slots, count_slots
from ale.actors.stop import Stop
from ale.actors.trainer import Trainer, Update
from ale.algorithm.filters import Reason
from ale.bus import Bus
from ale.config import RunConfig
from ale.data.task_stream import TaskStream
from ale.errors import ConfigError
from ale.simulation.episodes import Sampler
from ale.simulation.node import Node, SimulatedEnvs, SimulatedLearner, SimulatedPolicy
from ale.supervisor import Supervisor
from ale.task import Task
from ale.virtual_clock import run

_FILLING = 3  # updates left out of every figure: the pipeline fills up
_WASTED = (Reason.REDUNDANT, Reason.STRAGGLER, Reason.STALE)
_HOPELESS = 300  # groups for each that is wanted: the episodes give the trainer nothing


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """`Prediction(updates=100, seconds=812.0, episodes_per_hour=31200.0, ...)`; shares are of the time predicted."""

    updates: int
    seconds: float
    episodes_per_hour: float
    """That came to their own end in time: not what was ended early, or was too old."""
    trained_per_hour: float
    updates_per_hour: float
    lag_mean: float
    lag_max: int
    trainer_bubble: float
    """The trainer waits for a batch."""
    places_bubble: float
    """Places for episodes that are empty."""
    engine_bubble: float
    """No sequence is being generated."""
    dropped: dict[str, float]
    """Share of all episodes that ended, by reason."""
    dropped_tokens: dict[str, float]
    """Mean tokens of what was dropped, by reason."""
    trained_tokens: float
    """Mean tokens of what was trained on."""


class _Mark(msgspec.Struct):
    """What had been seen when the figures begin, or end."""

    at: float
    ended: int
    trained: int
    occupied_s: float
    busy_s: float
    dropped: dict[str, int]
    dropped_tokens: dict[str, int]


def simulate(config: RunConfig, node: Node, sampler: Sampler, *, updates: int = 100) -> Prediction:
    """Raises `ConfigError` when episodes like these never make a batch."""
    try:
        return run(_simulated(config, node, sampler, updates))
    except ConfigError as error:
        raise ConfigError(f"simulate: episodes like these never make a batch: {error}") from error


async def _simulated(config: RunConfig, node: Node, sampler: Sampler, updates: int) -> Prediction:
    c = config.rollout
    total = updates + _FILLING
    config = msgspec.structs.replace(
        config,
        learner=msgspec.structs.replace(config.learner, updates=total, step_deadline_s=1e9),
        rollout=msgspec.structs.replace(c, batch_deadline_s=1e9),
    )
    clock = asyncio.get_running_loop()
    episodes, ledger, bus = Episodes(c.concurrency), Ledger(), Bus()
    devices = config.model.pool or 1
    policy = SimulatedPolicy(node, c.engine_rows or c.concurrency, devices)
    learner = SimulatedLearner(policy, node)
    envs = SimulatedEnvs(
        policy,
        sampler,
        episodes,
        concurrency=c.concurrency,
        timeout_s=config.agent.episode_timeout_s,
        seed=config.seed,
    )
    made: list[Update] = []
    tokens: list[int] = []
    marks: list[_Mark] = []

    def mark() -> None:
        seen = ledger.statistics()
        ended = seen.started - seen.running - seen.buffered
        tokens = dict(ledger.books.dropped_tokens)
        marks.append(_Mark(clock.time(), ended, seen.trained, envs.occupied(), policy.busy(), seen.dropped, tokens))

    async def after(update: Update) -> None:
        made.append(update)
        tokens.extend(t.action_tokens for t in update.trajectories)
        ledger.books.since.clear()
        if len(made) == _FILLING:
            learner.lags.clear()
            tokens.clear()
            mark()

    async with Supervisor(bus) as outer:
        await outer.start(envs)
        shared = Devices()
        if config.model.pool is not None:
            shared = await open_devices(Pool(devices=devices, training=config.update_threads), policy.resize)
        slots = Slots(count_slots(c))
        async with Supervisor(bus) as actors:
            buffer = SampleBuffer(slots, ledger, max_lag=c.max_lag, on_stale=c.on_stale)
            tasks = TaskStream(_tasks(_HOPELESS * total * c.groups_per_step))
            generator = Generator(config, tasks, slots, ledger, episodes, {})
            trainer = Trainer(config, learner, policy, slots, ledger, after, Stop(), shared)
            for actor in (buffer, generator, trainer):
                await actors.start(actor)
            await actors.join(trainer)
            mark()
    return _predicted(marks[0], marks[-1], made[_FILLING:], learner.lags, tokens, c.concurrency)


def _predicted(
    first: _Mark, last: _Mark, made: list[Update], lags: list[int], tokens: list[int], places: int
) -> Prediction:
    seconds = max(last.at - first.at, 1e-9)
    ended = last.ended - first.ended
    dropped = {reason: n - first.dropped.get(reason, 0) for reason, n in last.dropped.items()}
    dropped = {reason: n for reason, n in dropped.items() if n}
    lengths = {reason: last.dropped_tokens[reason] - first.dropped_tokens.get(reason, 0) for reason in dropped}
    return Prediction(
        updates=len(made),
        seconds=seconds,
        episodes_per_hour=(ended - sum(dropped.get(reason, 0) for reason in _WASTED)) / seconds * 3600,
        trained_per_hour=(last.trained - first.trained) / seconds * 3600,
        updates_per_hour=len(made) / seconds * 3600,
        lag_mean=statistics.fmean(lags) if lags else 0.0,
        lag_max=max(lags, default=0),
        trainer_bubble=sum(u.wait_s for u in made) / seconds,
        places_bubble=1 - (last.occupied_s - first.occupied_s) / (seconds * places),
        engine_bubble=1 - (last.busy_s - first.busy_s) / seconds,
        dropped={reason: n / ended for reason, n in dropped.items()},
        dropped_tokens={reason: lengths[reason] / n for reason, n in dropped.items()},
        trained_tokens=statistics.fmean(tokens) if tokens else 0.0,
    )


def _tasks(most: int) -> Iterator[Task]:
    """As many as a run could need; one that needs more gets nowhere."""
    return (Task(id=f"simulated-{n}") for n in range(most))
