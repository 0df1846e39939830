"""Scripted stand-ins for the expensive parts of a run: the loop around them is the real one, on `ale.testing.clock`.

    policy = FakePolicy()
    envs = ScriptedEnvs(lambda rollout: Play(reward=1.0, latency_s=3.0), policy)
    learner = FakeLearner(policy, latency_s=lambda update: 5.0)
    trainer = Trainer(config, learner, policy, slots, ledger, after)

The environment manager answers `Rollout` as the real one does: a failure is a status of the trajectory, each token
carries the version that the policy had when it was sampled, and a `Play` with an `error` is a bug that escapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol, cast

import msgspec

from ale.actor import Actor
from ale.errors import PolicyError
from ale.messages import Chunk, Generate, Rollout, Status, StepMetrics, TrainStep, Trajectory, Turn
from ale.wire import Array, Message, Reply, Request


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """How one rollout goes: `Play(reward=1.0, latency_s=4.0, tokens=4)` samples a token a second.

    There is at least one token. `error` is raised instead of an answer, after the latency; `logp` is what every
    token is recorded with.
    """

    reward: float | None = 0.0
    latency_s: float = 0.0
    tokens: int = 2
    status: Status = "scored"
    logp: float = -1.0
    error: Exception | None = None


class FakePolicy:
    """The policy port without a model: it has a version, and loading weights takes `load_s`."""

    def __init__(self, *, load_s: float = 0.0) -> None:
        self.version = 0
        self._load_s = load_s

    async def generate(self, request: Generate) -> Turn:
        raise PolicyError(f"{request.session}: a FakePolicy generates nothing; `ScriptedEnvs` plays whole episodes")

    async def end_session(self, session: str) -> None:
        pass

    async def load_weights(self, version: int, slot: int) -> None:
        await asyncio.sleep(self._load_s)
        self.version = version


class Places(Protocol):
    """What the environment manager tells of its episodes: `ale.actors.episodes.Episodes`."""

    def place(self, rollout: str) -> AbstractAsyncContextManager[None]: ...

    def asked(self, rollout: str, version: int) -> None: ...

    def heard(self, rollout: str, tokens: int, oldest: int) -> None: ...


class ScriptedEnvs(Actor):
    """The actor "envs": each `Rollout` goes as `script` says. `received` holds all of them in order, `cancelled` those
    whose caller did not wait for their end."""

    cancel_abandoned = True

    def __init__(
        self,
        script: Callable[[Rollout], Play],
        policy: FakePolicy,
        *,
        concurrency: int = 1024,
        watch: Callable[[], None] = lambda: None,
        episodes: Places | None = None,
    ) -> None:
        """`watch` is called whenever a rollout begins or ends."""
        super().__init__("envs", capacity=4 * concurrency, concurrency=concurrency)
        self._script = script
        self._policy = policy
        self._watch = watch
        self._episodes = episodes
        self.received: list[Rollout] = []
        self.cancelled: list[str] = []
        self.running = 0

    async def receive(self, message: Message) -> Trajectory | None:
        match message:
            case Rollout():
                async with self._episodes.place(message.id) if self._episodes else nullcontext():
                    return await self._episode(message)
            case _:
                await super().receive(message)
        return None

    async def _episode(self, rollout: Rollout) -> Trajectory:
        self.received.append(rollout)
        self.running += 1
        try:
            self._watch()
            return await self._play(rollout, self._script(rollout))
        except asyncio.CancelledError:
            self.cancelled.append(rollout.id)
            raise
        finally:
            self.running -= 1
            self._watch()

    async def _play(self, rollout: Rollout, play: Play) -> Trajectory:
        clock, started, versions = asyncio.get_running_loop(), self._policy.version, list[int]()
        began, status, reward = clock.time(), play.status, play.reward
        try:
            async with asyncio.timeout(rollout.straggler_s):
                for _ in range(play.tokens):
                    versions.append(self._policy.version)
                    if self._episodes is not None:
                        self._episodes.asked(rollout.id, self._policy.version)
                        self._episodes.heard(rollout.id, 1, self._policy.version)
                    await asyncio.sleep(play.latency_s / play.tokens)
        except TimeoutError:
            status, reward = "straggler", None
        if play.error is not None:
            raise play.error
        return Trajectory(
            id=rollout.id,
            group=rollout.group,
            task=rollout.task.id,
            family=rollout.task.family,
            level=rollout.task.level,
            tokens_T=Array.of([1, *range(2, len(versions) + 2)], "int32"),
            chunks=(Chunk(1, len(versions) + 1, "answer"),),
            logp_A=Array.of([play.logp] * len(versions), "float32"),
            logp_sampled_A=Array.of([play.logp] * len(versions), "float32"),
            version_A=Array.of(versions, "int32"),
            reward=reward,
            status=status,
            cause=None if status == "scored" else f"scripted {status}",
            started_version=started,
            duration_s=clock.time() - began,
        )


class FakeLearner:
    """Answers `TrainStep` after `latency_s(update)`, with the next version. `steps` holds what it was asked to train
    on, `weights` the names of all that went into the weights; `drop` names, by trajectory, why it trains on some of it
    not; `error(update)` is raised instead of an answer.
    """

    def __init__(
        self,
        policy: FakePolicy,
        *,
        latency_s: Callable[[int], float] = lambda update: 0.0,
        drop: Callable[[Trajectory], str | None] = lambda trajectory: None,
        error: Callable[[int], Exception | None] = lambda update: None,
    ) -> None:
        self._policy = policy
        self._latency_s = latency_s
        self._drop = drop
        self._error = error
        self.steps: list[TrainStep] = []
        self.weights: list[str] = []
        self.lags: list[int] = []
        """For each step, the version trained minus the oldest version of any token in it."""

    async def ask(self, request: Request[Reply], *, deadline_s: float) -> Reply:
        if not isinstance(request, TrainStep):
            raise TypeError(f"a FakeLearner answers TrainStep, not {type(request).__name__}")
        self.steps.append(request)
        number = len(self.steps)
        trajectories = [s.trajectory for s in request.samples]
        self.lags.append(self._policy.version - min(int(t.version_A.numpy().min()) for t in trajectories))
        async with asyncio.timeout(deadline_s):
            await asyncio.sleep(self._latency_s(number))
        error = self._error(number)
        if error is not None:
            raise error
        dropped: Mapping[str, str | None] = {t.id: self._drop(t) for t in trajectories}
        self.weights += [id_ for id_, reason in dropped.items() if reason is None]
        metrics = StepMetrics(
            version=self._policy.version + 1,
            slot=0,
            loss=0.0,
            grad_norm=1.0,
            values={},
            dropped={id_: reason for id_, reason in dropped.items() if reason is not None},
        )
        return cast(Reply, metrics)
