"""The rollout generator: keeps every slot filled with a group of rollouts of one task.

A rollout whose reward cannot be trusted is replaced at once by a new one from the same start state with the current
policy, so a group never comes up short; a group without a gradient is dropped and its slot goes to the next task.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator

import msgspec

from ale.actor import Actor
from ale.actors.env_manager import rollout_deadline_s
from ale.actors.ledger import Ledger
from ale.actors.reward_shuffle import RewardShuffle
from ale.actors.slots import Slots
from ale.algorithm.filters import Reason, group_reason, logp_reason, rollout_reason
from ale.config import RunConfig
from ale.errors import first_error
from ale.messages import Group, GroupEnded, GroupStarted, Rollout, Sampling, TasksEnded, Trajectory
from ale.task import Task

logger = logging.getLogger(__name__)

_TELL_DEADLINE_S = 600.0
# More replacements than this for one group, times its size, mean that the task itself is broken.
_REPLACEMENTS = 2
_RECENT = 256


class Generator(Actor):
    """`tasks` may end: then the generator ends with its last group, and the buffer learns that no other will come."""

    def __init__(self, config: RunConfig, tasks: Iterator[Task], slots: Slots, ledger: Ledger) -> None:
        super().__init__("generator", capacity=1)
        self._config = config
        self._tasks = tasks
        self._slots = slots
        self._ledger = ledger
        self._groups = 0
        self._shuffle = RewardShuffle(config.seed) if config.algorithm.shuffle_rewards else None
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._rollouts = 0

    def recent_success(self) -> float:
        """The share of the last scored rollouts, filtered ones included, that were solved."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as groups:
                await self._start_groups(groups)
        except ExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        await self.bus.tell("buffer", TasksEnded(started=self._groups), deadline_s=_TELL_DEADLINE_S)

    async def _start_groups(self, groups: asyncio.TaskGroup) -> None:
        """One for each slot, until the tasks end."""
        while True:
            async with self.bus.waiting("a free slot: given back when an update is live"):
                await self._slots.wait()
            task = next(self._tasks, None)
            if task is None:
                return
            self._groups += 1
            name = f"g{self._groups}"
            self._slots.take(name)
            await self.bus.tell("buffer", GroupStarted(group=name), deadline_s=_TELL_DEADLINE_S)
            groups.create_task(self._group(name, task), name=f"group {name}")

    async def _group(self, name: str, task: Task) -> None:
        members = await self._members(name, task)
        reason = (
            Reason.GROUP_TOO_SMALL
            if members is None
            else group_reason([t.reward or 0.0 for t in members], self._config.algorithm.baseline)
        )
        if members is not None and reason is None:
            self._ledger.buffer(t.id for t in members)
            group = Group(id=name, task=task.id, trajectories=tuple(members))
            await self.bus.tell("buffer", group, deadline_s=_TELL_DEADLINE_S)
            return
        for t in members or ():
            self._ledger.drop(t.id, str(reason), t.action_tokens)
        await self.bus.tell("buffer", GroupEnded(group=name, reason=str(reason)), deadline_s=_TELL_DEADLINE_S)
        self._slots.give_back(name)

    async def _members(self, name: str, task: Task) -> list[Trajectory] | None:
        """The scored rollouts of a group; None, with everything dropped, when the task keeps failing."""
        size = self._config.rollout.group_size
        attempts = size * (1 + _REPLACEMENTS)
        members: list[Trajectory] = []
        async with asyncio.TaskGroup() as rollouts:
            running = {rollouts.create_task(self._rollout(name, i, task)) for i in range(size)}
            started = size
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for finished in done:
                    trajectory = finished.result()
                    if trajectory is not None:
                        members.append(trajectory)
                    elif started < attempts:
                        running.add(rollouts.create_task(self._rollout(name, started, task)))
                        started += 1
        if len(members) == size:
            return sorted(members, key=lambda t: int(t.id.rpartition("/")[2]))  # not in the order of their ends
        logger.warning(
            "group %s: task %s failed %d times; the group is dropped", name, task.id, attempts - len(members)
        )
        for t in members:
            self._ledger.drop(t.id, str(Reason.GROUP_TOO_SMALL), t.action_tokens)
        return None

    async def _rollout(self, group: str, member: int, task: Task) -> Trajectory | None:
        """One scored rollout, or None when it had to be dropped."""
        c = self._config.rollout
        self._rollouts += 1
        id_ = f"{group}/{member}"
        # Turns count up from the rollout's seed: seeds of different rollouts lie far apart.
        seed = (self._config.seed << 40) + (self._rollouts << 10)
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, seed=seed)
        rollout = Rollout(id=id_, group=group, task=task, sampling=sampling)
        self._ledger.start(id_)
        trajectory = await self.bus.ask("envs", rollout, deadline_s=rollout_deadline_s(self._config))
        reason = _why_not(trajectory)
        if reason is None and trajectory.reward is not None:
            self._recent.append(trajectory.reward > 0)
            if self._shuffle is None:
                return trajectory
            reward = self._shuffle.swap(trajectory.reward)
            if reward is not None:
                return msgspec.structs.replace(trajectory, reward=reward)
            reason = "shuffle_pool"
        logger.info("rollout %s of %s is dropped: %s (%s)", id_, task.id, reason, trajectory.cause)
        self._ledger.drop(id_, str(reason), trajectory.action_tokens)
        return None


def _why_not(trajectory: Trajectory) -> str | None:
    """Why this trajectory must not be trained on; None where nothing is wrong."""
    if trajectory.status != "scored":
        return trajectory.status
    reasons = (logp_reason(None, t.logp_A.numpy(), t.logp_sampled_A.numpy()) for t in trajectory.sequences)
    return rollout_reason(reward=trajectory.reward) or next(filter(None, reasons), None)
