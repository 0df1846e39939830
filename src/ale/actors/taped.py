"""Between an episode and what it asks: every answer from outside goes through the tape (`ale.tape`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ale.agent.episode import Judge
from ale.envs.env import Env, MakeEnv, Step
from ale.messages import Generate, Rollout, Score, Trajectory, Turn
from ale.policy.port import Policy
from ale.tape import Tape
from ale.task import Task

Play = Callable[[Rollout], Awaitable[Trajectory]]


class TapedPolicy:
    """A `Policy`. New weights count from the point at which they are on the tape."""

    def __init__(self, policy: Policy, tape: Tape) -> None:
        self._policy, self._tape = policy, tape
        self.version = policy.version

    async def generate(self, request: Generate) -> Turn:
        if not self._tape.covers(request.session):
            return await self._policy.generate(request)
        turn: Turn = await self._tape.answer("turn", request.session, lambda: self._policy.generate(request), Turn)
        return turn

    async def end_session(self, session: str) -> None:
        await self._policy.end_session(session)

    async def load_weights(self, version: int, slot: int) -> None:
        await self._policy.load_weights(version, slot)
        await self._tape.reach("live", str(version))
        self.version = version


class TapedEnv:
    """An `Env` of one rollout."""

    def __init__(self, env: Env, rollout: str, tape: Tape) -> None:
        self._env, self._rollout, self._tape = env, rollout, tape

    async def reset(self) -> str:
        told: str = await self._tape.answer("reset", self._rollout, self._env.reset, str)
        return told

    async def step(self, action: str) -> Step:
        step: Step = await self._tape.answer("act", self._rollout, lambda: self._env.step(action), Step)
        return step

    async def score(self) -> Score:
        score: Score = await self._tape.answer("score", self._rollout, self._env.score, Score)
        return score

    async def close(self) -> None:
        await self._env.close()


def taped_env(make_env: MakeEnv, rollout: str, tape: Tape) -> MakeEnv:
    def make(task: Task) -> Env:
        return TapedEnv(make_env(task), rollout, tape)

    return make


def taped_judge(judge: Judge | None, rollout: str, tape: Tape) -> Judge | None:
    if judge is None:
        return None

    async def ask(trajectory: Trajectory) -> float:
        reward: float = await tape.answer("judge", rollout, lambda: judge(trajectory), float)
        return reward

    return ask


async def taped_play(play: Play, rollout: Rollout, tape: Tape) -> Trajectory:
    trajectory: Trajectory = await tape.answer("play", rollout.id, lambda: play(rollout), Trajectory)
    return trajectory
