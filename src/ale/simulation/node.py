"""The parts of a simulated node: an engine that is shared by whoever generates, environments, a learner."""

from __future__ import annotations

import asyncio
import random
from typing import cast

import msgspec

from ale.actor import Actor
from ale.actors.episodes import Episodes
from ale.errors import PolicyError
from ale.messages import Chunk, Generate, Rollout, StepMetrics, TrainStep, Trajectory, Turn
from ale.simulation.episodes import Sampler
from ale.wire import Array, Message, Reply, Request

_PIECES = 8  # of a turn: new weights take effect between two


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """`Node(token_s=0.002, row_s=0.0004, step_s=6, sync_s=0.3)`: what its devices need.

    One more token for each of n running sequences takes `token_s + n * row_s`, an update `step_s`, new weights
    `sync_s`.
    With a pool (`model.pool`) these are the times when all of the pool, or all that the update may have, works on it.
    """

    token_s: float = 0.0
    row_s: float = 0.0
    step_s: float = 1.0
    sync_s: float = 0.0


class SimulatedPolicy:
    """A version, and how long a token takes now."""

    def __init__(self, node: Node, rows: int, devices: int) -> None:
        self.version = 0
        self._busy_s = 0.0
        self._node = node
        self._rows = asyncio.Semaphore(rows)
        self._generating = 0
        self._devices = self._all = devices
        self._since = 0.0

    async def tokens(self, count: int) -> list[int]:
        """A turn of so many tokens: the version of each."""
        versions: list[int] = []
        async with self._rows:
            self._count(1)
            try:
                for piece in range(_PIECES):
                    n = count * (piece + 1) // _PIECES - count * piece // _PIECES
                    versions += [self.version] * n
                    each_s = self._node.token_s + self._generating * self._node.row_s
                    if n and each_s:
                        await asyncio.sleep(n * each_s * self._all / self._devices)
            finally:
                self._count(-1)
        return versions

    def busy(self) -> float:
        """Seconds in which something was being generated, until now."""
        self._count(0)
        return self._busy_s

    def _count(self, change: int) -> None:
        now = asyncio.get_running_loop().time()
        if self._generating:
            self._busy_s += now - self._since
        self._since = now
        self._generating += change

    async def resize(self, devices: int) -> None:
        """What is being generated goes on with these from its next piece on."""
        self._devices = devices

    async def generate(self, request: Generate) -> Turn:
        raise PolicyError(f"{request.session}: a simulated policy says nothing; its environments play whole episodes")

    async def end_session(self, session: str) -> None:
        pass

    async def load_weights(self, version: int, slot: int) -> None:
        await asyncio.sleep(self._node.sync_s)
        self.version = version


class SimulatedEnvs(Actor):
    """The actor "envs". What a rollout is like depends on its name and the seed alone."""

    cancel_abandoned = True

    def __init__(
        self,
        policy: SimulatedPolicy,
        sampler: Sampler,
        episodes: Episodes,
        *,
        concurrency: int,
        timeout_s: float,
        seed: int,
    ) -> None:
        super().__init__("envs", capacity=4 * concurrency, concurrency=concurrency)
        self._policy = policy
        self._sampler = sampler
        self._episodes = episodes
        self._timeout_s = timeout_s
        self._seed = seed
        self._occupied_s = 0.0
        self._since = 0.0
        self._playing = 0

    def occupied(self) -> float:
        """Places times the seconds in which they were taken, until now."""
        self._count(0)
        return self._occupied_s

    def _count(self, change: int) -> None:
        now = asyncio.get_running_loop().time()
        self._occupied_s += self._playing * (now - self._since)
        self._since = now
        self._playing += change

    async def receive(self, message: Message) -> Trajectory | None:
        match message:
            case Rollout():
                async with self._episodes.place(message.id):
                    self._count(1)
                    try:
                        return await self._play(message)
                    finally:
                        self._count(-1)
            case _:
                await super().receive(message)
        return None

    async def _play(self, rollout: Rollout) -> Trajectory:
        episode = self._sampler.draw(random.Random(f"{self._seed}/{rollout.id}"))
        clock, started = asyncio.get_running_loop(), self._policy.version
        began, versions = clock.time(), list[int]()
        status, reward = episode.status, episode.reward
        straggler = rollout.straggler_s is not None and rollout.straggler_s < self._timeout_s
        try:
            async with asyncio.timeout(rollout.straggler_s if straggler else self._timeout_s):
                for turn in range(episode.turns):
                    n = episode.tokens * (turn + 1) // episode.turns - episode.tokens * turn // episode.turns
                    self._episodes.asked(rollout.id, self._policy.version)
                    said = await self._policy.tokens(n)
                    if said:
                        self._episodes.heard(rollout.id, n, min(said))
                    versions += said
                    await asyncio.sleep(episode.tools_s / episode.turns)
        except TimeoutError:
            status, reward = "straggler" if straggler else "episode_timeout", None
        n = len(versions)
        flat = Array.of([-1.0] * n, "float32")
        return Trajectory(
            id=rollout.id,
            group=rollout.group,
            task=rollout.task.id,
            family=rollout.task.family,
            level=rollout.task.level,
            tokens_T=Array.of(range(n + 1), "int32"),
            chunks=(Chunk(1, n + 1, "answer"),) if n else (),
            logp_A=flat,
            logp_sampled_A=flat,
            version_A=Array.of(versions, "int32"),
            reward=reward,
            status=status,
            cause=None if status == "scored" else "drawn",
            started_version=started,
            duration_s=clock.time() - began,
        )


class SimulatedLearner:
    """Answers `TrainStep` after `step_s`."""

    def __init__(self, policy: SimulatedPolicy, node: Node) -> None:
        self._policy = policy
        self._node = node
        self.lags: list[int] = []
        """Of every trajectory trained on."""

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        if not isinstance(request, TrainStep):
            raise TypeError(f"a simulated learner answers TrainStep, not {type(request).__name__}")
        version = self._policy.version
        self.lags += [version - s.trajectory.oldest_version for s in request.samples]
        async with asyncio.timeout(deadline_s):
            await asyncio.sleep(self._node.step_s)
        return cast(Reply, StepMetrics(version=version + 1, slot=0, loss=0.0, grad_norm=1.0, values={}))
