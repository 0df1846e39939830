"""The rollout generator: keeps every slot filled with a group of rollouts of one task.

A rollout whose reward cannot be trusted is replaced at once by a new one from the same start state with the current
policy, so a group never comes up short; a group without a gradient is dropped and its slot goes to the next task.

What is not needed ends at once: members beyond `group_size` when the group is full, and a group of which something is
too old for any batch to come. Their rollouts are cancelled, and booked as dropped with the tokens that they sampled.

In a resumed run the groups that were under way come first: what had finished in them is kept, what had not runs again
under its own name, with its own seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import statistics

import msgspec

from ale.actor import Actor
from ale.actors.env_manager import rollout_deadline_s
from ale.actors.episodes import Episodes
from ale.actors.ledger import Ledger
from ale.actors.reward_shuffle import exchange
from ale.actors.slots import Slots
from ale.algorithm.filters import Reason, group_reason, logp_reason, rollout_reason
from ale.algorithm.selection import Outcomes
from ale.config import RunConfig
from ale.data.books import OpenGroup, kind_of
from ale.data.task_stream import TaskStream
from ale.errors import first_error
from ale.messages import GroupEnded, GroupStarted, Rollout, Sampling, TasksEnded, Trajectory
from ale.task import Task
from ale.waiting import named

logger = logging.getLogger(__name__)

_TELL_DEADLINE_S = 600.0
# More replacements than this for one group, times its size, mean that the task itself is broken.
_REPLACEMENTS = 2
# Fewer episodes than this say nothing about how long one takes.
_KNOWN_DURATIONS = 16


class Generator(Actor):
    """`tasks` may end: then the generator ends with its last group, and the buffer learns that no other will come.

    `under_way` holds the tasks of the groups that the ledger shows as running when the generator starts.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: TaskStream,
        slots: Slots,
        ledger: Ledger,
        episodes: Episodes,
        under_way: dict[str, Task],
    ) -> None:
        super().__init__("generator", capacity=1)
        self._config = config
        self._tasks = tasks
        self._slots = slots
        self._ledger = ledger
        self._episodes = episodes
        self._under_way = under_way
        self._groups: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as outer:
                ending = outer.create_task(self._end_outdated(), name="groups that are too old")
                async with asyncio.TaskGroup() as groups:
                    for name, task in self._under_way.items():
                        self._begin(groups, self._ledger.books.groups[name], task)
                    await self._start_groups(groups)
                ending.cancel()
        except ExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        await self.bus.tell("buffer", TasksEnded(started=self._ledger.books.opened), deadline_s=_TELL_DEADLINE_S)

    async def _start_groups(self, groups: asyncio.TaskGroup) -> None:
        """One for each slot, until the tasks end."""
        while True:
            async with self.bus.waiting("a free slot: given back when an update is live", on="actor trainer"):
                await self._slots.wait()
            task = self._next_task()
            if task is None:
                return
            group = self._ledger.open(task.id, self._tasks.drawn)
            self._slots.take(group.id)
            await self.bus.tell("buffer", GroupStarted(group=group.id), deadline_s=_TELL_DEADLINE_S)
            self._begin(groups, group, task)

    def _begin(self, groups: asyncio.TaskGroup, group: OpenGroup, task: Task) -> None:
        running = groups.create_task(self._group(group, task), name=f"group {group.id}")
        self._groups[group.id] = running
        running.add_done_callback(lambda _: self._groups.pop(group.id))

    def _next_task(self) -> Task | None:
        """What is passed over leaves the stream too; which tasks those are depends on the seed and on the books."""
        c = self._config
        if c.tasks.selection == "all":
            return next(self._tasks, None)
        for task in self._tasks:
            chance = self._ledger.books.outcomes.get(kind_of(task), Outcomes()).chance(c.tasks.selection)
            if random.Random(f"selection/{c.seed}/{self._tasks.drawn}").random() < chance:
                return task
        return None

    async def _group(self, group: OpenGroup, task: Task) -> None:
        await self._run_members(group, task)
        if len(group.members) < self._config.rollout.group_size:
            failed = ", ".join(f"{n} {reason}" for reason, n in sorted(group.failed.items()))
            # An agent that cannot call tools yet is counted with the dropped; anything else may need the user.
            level = logging.INFO if set(group.failed) == {"illegal_tool_calls"} else logging.WARNING
            logger.log(level, "group %s: task %s keeps failing and is given up: %s", group.id, task.id, failed)
            reason: Reason | None = Reason.GROUP_TOO_SMALL
        else:
            rewards = [t.reward or 0.0 for t in group.members]
            reason = group_reason(rewards, self._config.algorithm.baseline)
        if reason is None:
            await self.bus.tell("buffer", self._ledger.buffer(group), deadline_s=_TELL_DEADLINE_S)
        else:
            await self._drop(group, reason)

    async def _drop(self, group: OpenGroup, reason: Reason) -> None:
        self._ledger.drop_group(group.id, reason)
        await self.bus.tell("buffer", GroupEnded(group=group.id, reason=str(reason)), deadline_s=_TELL_DEADLINE_S)
        self._slots.give_back(group.id)

    async def _end_outdated(self) -> None:
        """Ends the groups of which something is too old for the next batch, as soon as a batch was taken."""
        c = self._config.rollout
        # Without lag, what is under way when a batch is taken was started to be faster than what is in it.
        reason = Reason.REDUNDANT if c.extra_groups and not c.max_lag else Reason.STALE
        while True:
            what = "the next batch to be taken, after which older groups end"
            async with self.bus.waiting(what, on="actor trainer"):
                await self._slots.raised.wait()
            self._slots.raised.clear()
            for name, task in list(self._groups.items()):
                group = self._ledger.books.groups.get(name)
                if group is None or group.buffered or not self._is_outdated(group):
                    continue
                logger.info("group %s is ended: %s, older than version %d", name, reason, self._slots.floor)
                task.cancel()
                self._end_running(group, reason)
                await self._drop(group, reason)

    def _is_outdated(self, group: OpenGroup) -> bool:
        versions = [t.oldest_version for t in group.members]
        versions += [v for name in group.running if (v := self._episodes.first_version(name)) is not None]
        return min(versions, default=self._slots.floor) < self._slots.floor

    def _end_running(self, group: OpenGroup, reason: Reason) -> None:
        """Books the rollouts of a group that are cancelled."""
        for name in list(group.running):
            self._ledger.drop(name, str(reason), self._episodes.sampled(name))

    async def _run_members(self, group: OpenGroup, task: Task) -> None:
        """Returns when the group has all its members, or too many of its rollouts had to be dropped."""
        c = self._config.rollout
        attempts = c.group_size * (1 + _REPLACEMENTS) + c.extra_members
        async with asyncio.TaskGroup() as rollouts:
            running: dict[str, asyncio.Task[None]] = {}
            wanted = list(group.running)
            while len(group.members) < c.group_size:
                at_once = c.group_size + c.extra_members - len(group.members)
                while len(group.running) < at_once and group.started < attempts:
                    wanted.append(self._ledger.start(group))
                for name in wanted:
                    running[name] = rollouts.create_task(self._rollout(name, group, task), name=f"rollout {name}")
                wanted = []
                if not running:
                    return
                with named(f"{len(running)} rollouts of group {group.id}", on="actor envs"):
                    await asyncio.wait(running.values(), return_when=asyncio.FIRST_COMPLETED)
                for name in [name for name, one in running.items() if one.done()]:
                    running.pop(name).result()
            for unneeded in running.values():
                unneeded.cancel()
            self._end_running(group, Reason.REDUNDANT)

    async def _rollout(self, name: str, group: OpenGroup, task: Task) -> None:
        """One rollout, kept or dropped."""
        c = self._config.rollout
        sampling = Sampling(
            temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, seed=seed_of(name, self._config.seed)
        )
        rollout = Rollout(id=name, group=group.id, task=task, sampling=sampling, straggler_s=self._straggler_s())
        trajectory = await self.bus.ask("envs", rollout, deadline_s=rollout_deadline_s(self._config))
        if name not in group.running:
            return  # it was ended in the very moment of its answer, and is booked as that
        if len(group.members) == c.group_size:
            self._ledger.drop(name, str(Reason.REDUNDANT), trajectory.action_tokens)
            return
        reason = _why_not(trajectory)
        if reason is not None or trajectory.reward is None:
            logger.info("rollout %s of %s is dropped: %s (%s)", name, task.id, reason, trajectory.cause)
            self._ledger.drop(name, str(reason), trajectory.action_tokens)
            return
        solved, swap = self._config.eval.solved(trajectory.reward), None
        if self._config.algorithm.shuffle_rewards:
            books = self._ledger.books
            swap, reward = exchange(books.pool, books.exchanges, self._config.seed, trajectory.reward)
            if reward is None:
                tokens = trajectory.action_tokens
                self._ledger.drop(name, "shuffle_pool", tokens, solved=solved, exchange=swap)
                return
            trajectory = msgspec.structs.replace(trajectory, reward=reward)
        self._ledger.keep(trajectory, solved=solved, exchange=swap)

    def _straggler_s(self) -> float | None:
        """How long a rollout that begins now may take."""
        c, durations = self._config.rollout, self._ledger.books.durations
        limits = [] if c.straggler_s is None else [c.straggler_s]
        if c.straggler_factor is not None and len(durations) >= _KNOWN_DURATIONS:
            limits.append(c.straggler_factor * statistics.median(durations))
        return min(limits, default=None)


def seed_of(rollout: str, seed: int) -> int:
    """The seed of a rollout depends on its name and the run's seed alone: run again, it draws the same numbers.

    Turns count up from it; 52 random bits keep the turns of different rollouts apart.
    """
    digest = hashlib.blake2b(f"{seed}/{rollout}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 12) << 10


def _why_not(trajectory: Trajectory) -> str | None:
    """Why this trajectory must not be trained on; None where nothing is wrong."""
    if trajectory.status != "scored":
        return trajectory.status
    reasons = (logp_reason(None, t.logp_A.numpy(), t.logp_sampled_A.numpy()) for t in trajectory.sequences)
    return rollout_reason(reward=trajectory.reward) or next(filter(None, reasons), None)
