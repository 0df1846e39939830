"""The environment manager: runs episodes, up to `concurrency` at once. A failed one is a trajectory with a cause."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ale.actor import Actor
from ale.actors.episodes import Episodes
from ale.actors.slots import count_slots
from ale.agent.chat import Chat
from ale.agent.episode import Judge, run_episode
from ale.config import AgentConfig, RunConfig
from ale.envs.env import Env
from ale.messages import Rollout, Trajectory
from ale.policy.port import Policy
from ale.task import Task
from ale.waiting import failed, progressed
from ale.wire import Message

# Beyond the episodes' own time-outs: closing their sandboxes, and the loop's delays.
_SLACK_S = 60.0


def rollout_deadline_s(config: RunConfig) -> float:
    """The longest wait for one rollout: every one before it, of training and of an evaluation, may run into its
    time-out. An evaluation has at most twice `rollout.concurrency` of them at once; an adaptive run may be down to one
    place."""
    c = config.rollout
    training = count_slots(c) * (c.group_size + c.extra_members)
    rounds = 1 + (training + 2 * c.concurrency) / (1 if c.adaptive else c.concurrency)
    return config.agent.episode_timeout_s * rounds + _SLACK_S


Play = Callable[[Rollout], Awaitable[Trajectory]]


class EnvManager(Actor):
    """`play` None: episodes are those of the built-in agent loop. One whose caller has gone ends at once: its row in
    the engine, its sandbox and its place are free again."""

    cancel_abandoned = True

    def __init__(
        self,
        policy: Policy,
        make_env: Callable[[Task], Env],
        chat: Chat,
        limits: AgentConfig,
        episodes: Episodes,
        *,
        concurrency: int,
        play: Play | None = None,
        judge: Judge | None = None,
    ) -> None:
        super().__init__("envs", capacity=4 * concurrency, concurrency=concurrency)
        self._policy = policy
        self._make_env = make_env
        self._chat = chat
        self._limits = limits
        self._episodes = episodes
        self._play = play
        self._judge = judge

    async def receive(self, message: Message) -> Trajectory | None:
        match message:
            case Rollout():
                async with self._episodes.place(message.id):
                    return _told(await self._episode(message))
            case _:
                await super().receive(message)
        return None

    async def _episode(self, rollout: Rollout) -> Trajectory:
        if self._play is not None:
            return await self._play(rollout)
        return await run_episode(rollout, self._policy, self._make_env, self._chat, self._limits, self._judge)


def _told(trajectory: Trajectory) -> Trajectory:
    """The watchdog hears of it: an episode that the agent ended is progress, one that something else ended is not."""
    if trajectory.status in ("scored", "illegal_tool_calls", "stopped_by_alarm", "bad_logprob"):
        progressed(f"the episode {trajectory.id}")
    else:
        failed(trajectory.status)
    return trajectory
