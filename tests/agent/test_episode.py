import asyncio
from typing import Any

import pytest

from ale.agent.actions import render
from ale.agent.chat import Chat
from ale.agent.episode import demonstrate, run_episode
from ale.config import AgentConfig
from ale.envs.env import Step
from ale.envs.families import make
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.errors import DeadlineExceeded, EvaluatorError, PolicyError, SandboxError, WorkerDied
from ale.messages import Rollout, Sampling, Score, Trajectory
from ale.sandbox import SandboxEngine
from ale.task import REWARD_FILE, Task, TaskFile
from ale.testing.scripted_policy import ScriptedPolicy, logp_of

ROOMY = AgentConfig(max_turn_tokens=200, max_context_tokens=4000, max_turns=4, episode_timeout_s=60)
TEST = f'[ "$(cat a.txt)" = yes ] && r=1 || r=0; echo $r > {REWARD_FILE}'.encode()
TASK = Task(id="t-1", instruction="Write yes to a.txt.", files=(), tests=(TaskFile("test.sh", TEST),))
SOLVE = render("echo yes > a.txt")


class FakeEnv:
    """An environment that fails where it is told to, and counts."""

    def __init__(self, **failures: BaseException) -> None:
        self.failures = failures
        self.closed = 0
        self.stuck = asyncio.Event()

    async def _do(self, name: str) -> None:
        if (error := self.failures.get(name)) is not None:
            raise error

    async def reset(self) -> str:
        await self._do("reset")
        return "Go."

    async def step(self, action: str) -> Step:
        await self._do("step")
        if action == "hang":
            self.stuck.set()
            await asyncio.Event().wait()
        return Step("seen", terminated=action == "end")

    async def score(self) -> Score:
        await self._do("score")
        return Score(reward=1.0)

    async def close(self) -> None:
        self.closed += 1
        await self._do("close")


@pytest.fixture
def chat(nano_tokenizer: Any) -> Chat:
    return Chat(nano_tokenizer)


async def play(
    policy: ScriptedPolicy, make_env: Any, chat: Chat, limits: AgentConfig = ROOMY, task: Task = TASK
) -> Trajectory:
    rollout = Rollout(id="g/0", group="g", task=task, sampling=Sampling(seed=10, temperature=0.5))
    return await run_episode(rollout, policy, make_env, chat, limits)


def fake(chat: Chat, env: FakeEnv, *script: str | Exception, limits: AgentConfig = ROOMY) -> Any:
    policy = ScriptedPolicy(chat, *script, version=3)
    trajectory = asyncio.run(play(policy, lambda task: env, chat, limits))
    assert env.closed == 1
    check_books(trajectory, policy)
    return trajectory


def check_books(trajectory: Trajectory, policy: ScriptedPolicy) -> None:
    """What is on record is what was sampled, token for token."""
    tokens = trajectory.tokens_T.numpy().tolist()
    assert len(trajectory.chunks) == len(policy.turns)
    logp: list[float] = []
    for number, (chunk, turn) in enumerate(zip(trajectory.chunks, policy.turns, strict=True)):
        assert tokens[chunk.start : chunk.end] == turn.tokens_A.numpy().tolist()
        assert policy.requests[number].prompt_T.numpy().tolist() == tokens[: chunk.start]
        logp += logp_of(number, chunk.end - chunk.start).numpy().tolist()
    assert trajectory.logp_A.numpy().tolist() == trajectory.logp_sampled_A.numpy().tolist() == logp
    assert trajectory.version_A.numpy().tolist() == [policy.version] * len(logp)
    assert trajectory.action_tokens == sum(c.end - c.start for c in trajectory.chunks)
    assert all(a.end < b.start for a, b in zip(trajectory.chunks, trajectory.chunks[1:], strict=False))


def environments(engine: SandboxEngine, **options: Any) -> Any:
    return lambda task: TerminalEnv(task, engine, lambda task, snap: grade(engine, task, snap), **options)


def test_an_episode_in_a_real_sandbox_is_recorded_as_it_happened(
    loop: asyncio.Runner, sandboxes: SandboxEngine, chat: Chat
) -> None:
    policy = ScriptedPolicy(chat, "```\nls\n```", render("cat no-such-file"), SOLVE, "done", version=7)
    trajectory = loop.run(play(policy, environments(sandboxes), chat))
    check_books(trajectory, policy)
    assert (trajectory.reward, trajectory.status, trajectory.answer, trajectory.cause) == (1.0, "scored", "done", None)
    assert [c.ending for c in trajectory.chunks] == ["malformed", "call", "call", "answer"]
    assert [c.error for c in trajectory.chunks] == [True, True, False, False]
    assert [(r.call, r.exit_code) for r in trajectory.results] == [("cat no-such-file", 1), ("echo yes > a.txt", 0)]
    assert (trajectory.started_version, trajectory.oldest_version) == (7, 7)
    text = chat.text(trajectory.tokens_T.numpy().tolist())
    assert "error: a call starts with ```bash on a line of its own" in text
    assert "No such file or directory\n[exit 1]" in text
    assert [r.sampling.seed for r in policy.requests] == [10, 11, 12, 13]
    assert {(r.session, r.sampling.temperature, r.sampling.stop) for r in policy.requests} == {
        ("g/0", 0.5, (chat.end,))
    }
    assert policy.ended == ["g/0"]


def test_an_episode_that_does_not_solve_the_task_scores_zero(
    loop: asyncio.Runner, sandboxes: SandboxEngine, chat: Chat
) -> None:
    trajectory = loop.run(play(ScriptedPolicy(chat, "done"), environments(sandboxes), chat))
    assert (trajectory.reward, trajectory.status) == (0.0, "scored")


def test_a_turn_cut_at_its_limit_is_told_so_and_not_carried_out(chat: Chat) -> None:
    env = FakeEnv(step=AssertionError("a cut call must not run"))
    whole = chat.spoken(SOLVE)
    limits = AgentConfig(max_turn_tokens=len(whole) - 1, max_turns=2, max_context_tokens=4000)
    trajectory = fake(chat, env, SOLVE, "done", limits=limits)
    cut, answer = trajectory.chunks
    assert (cut.ending, cut.error, cut.end - cut.start) == ("cut", True, len(whole) - 1)
    between = trajectory.tokens_T.numpy().tolist()[cut.end : answer.start]
    assert between == chat.observation("error: the turn was cut at its token limit", ended=False)


def test_too_many_illegal_calls_end_the_episode_without_a_score(chat: Chat) -> None:
    env = FakeEnv(score=AssertionError("there is nothing to score"))
    limits = AgentConfig(max_turn_tokens=200, max_context_tokens=4000, max_illegal_calls=1)
    trajectory = fake(chat, env, "```", "```", "done", limits=limits)
    assert (trajectory.status, trajectory.reward, trajectory.cause) == ("illegal_tool_calls", None, "2 malformed calls")
    assert [c.ending for c in trajectory.chunks] == ["malformed", "malformed"]


def test_the_turn_limit_ends_an_episode_that_is_then_scored(chat: Chat) -> None:
    limits = AgentConfig(max_turn_tokens=200, max_context_tokens=4000, max_turns=3)
    trajectory = fake(chat, FakeEnv(), *[render("ls")] * 9, limits=limits)
    assert (len(trajectory.chunks), trajectory.reward, trajectory.answer) == (3, 1.0, None)


def test_the_context_limit_shortens_the_last_turn_and_ends_the_episode(chat: Chat) -> None:
    call = render("ls")
    first = len(chat.start("Go.")) + len(chat.spoken(call)) + len(chat.observation("seen", ended=True))
    limits = AgentConfig(max_turn_tokens=200, max_context_tokens=first + 2)
    trajectory = fake(chat, FakeEnv(), call, call, call, limits=limits)
    assert [c.ending for c in trajectory.chunks] == ["call", "cut"]
    assert trajectory.chunks[-1].end == limits.max_context_tokens
    assert trajectory.status == "scored"


def test_a_prompt_beyond_the_context_limit_asks_the_policy_nothing(chat: Chat) -> None:
    trajectory = fake(chat, FakeEnv(), "done", limits=AgentConfig(max_context_tokens=1))
    assert (trajectory.chunks, trajectory.action_tokens) == ((), 0)


def test_an_environment_may_end_the_episode_itself(chat: Chat) -> None:
    trajectory = fake(chat, FakeEnv(), render("end"), "done")
    assert (len(trajectory.chunks), trajectory.reward) == (1, 1.0)


@pytest.mark.parametrize(
    ("where", "error", "status"),
    [
        ("reset", SandboxError("gone"), "sandbox_failure"),
        ("step", SandboxError("gone"), "sandbox_failure"),
        ("score", SandboxError("gone"), "sandbox_failure"),
        ("score", EvaluatorError("crashed"), "evaluator_error"),
        ("policy", PolicyError("no memory"), "policy_failure"),
        ("policy", WorkerDied("killed"), "policy_failure"),
    ],
)
def test_a_failure_is_a_status_with_its_cause(chat: Chat, where: str, error: Exception, status: str) -> None:
    env = FakeEnv(**({} if where == "policy" else {where: error}))
    trajectory = fake(chat, env, render("ls"), error if where == "policy" else "done")
    assert (trajectory.status, trajectory.cause, trajectory.reward) == (status, str(error), None)


@pytest.mark.parametrize("failure", [SandboxError("gone"), DeadlineExceeded("the end of sandbox 7", 60.0)])
def test_a_failure_at_the_very_end_does_not_take_the_score_away(chat: Chat, failure: Exception) -> None:
    class Forgetful(ScriptedPolicy):
        async def end_session(self, session: str) -> None:
            raise WorkerDied("killed")

    env = FakeEnv(close=failure)
    trajectory = asyncio.run(play(Forgetful(chat, "done"), lambda task: env, chat))
    assert (trajectory.status, trajectory.reward, env.closed) == ("scored", 1.0, 1)


def test_an_episode_that_takes_too_long_is_a_timeout(
    loop: asyncio.Runner, sandboxes: SandboxEngine, chat: Chat
) -> None:
    policy = ScriptedPolicy(chat, render("sleep 1000"), "done")
    limits = AgentConfig(max_turn_tokens=200, max_context_tokens=4000, episode_timeout_s=0.7)
    trajectory = loop.run(play(policy, environments(sandboxes), chat, limits))
    assert (trajectory.status, trajectory.cause, trajectory.reward) == ("episode_timeout", "longer than 0.7 s", None)
    check_books(trajectory, policy)
    assert policy.ended == ["g/0"]


def test_a_cancelled_episode_ends_its_session_and_closes_its_environment(chat: Chat) -> None:
    class Dying(ScriptedPolicy):
        async def end_session(self, session: str) -> None:
            await super().end_session(session)
            raise WorkerDied("killed")

    async def scenario() -> None:
        env, policy = FakeEnv(close=SandboxError("gone")), Dying(chat, render("hang"))
        task = asyncio.ensure_future(play(policy, lambda task: env, chat))
        await env.stuck.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (env.closed, policy.ended) == (1, ["g/0"])

    asyncio.run(scenario())


def test_a_demonstration_shows_the_solution_as_an_episode(
    loop: asyncio.Runner, sandboxes: SandboxEngine, chat: Chat
) -> None:
    task = make("fix", 1)
    shown = loop.run(demonstrate(task, environments(sandboxes), chat, ROOMY))
    said = [chat.text(shown.tokens_T.numpy()[c.start : c.end].tolist()) for c in shown.chunks]
    assert said == [*map(render, task.solution), "done"]
    assert [c.ending for c in shown.chunks] == ["call"] * len(task.solution) + ["answer"]
    policy = ScriptedPolicy(chat, *said)
    limits = AgentConfig(max_turn_tokens=200, max_context_tokens=4000, max_turns=9)
    played = loop.run(play(policy, environments(sandboxes), chat, limits, task))
    assert played.tokens_T == shown.tokens_T
    assert played.reward == 1.0


def test_a_solution_that_fails_is_not_shown(loop: asyncio.Runner, sandboxes: SandboxEngine, chat: Chat) -> None:
    import msgspec

    task = msgspec.structs.replace(TASK, solution=("echo no > a.txt",))
    with pytest.raises(EvaluatorError, match="reference solution of t-1 gets the reward 0"):
        loop.run(demonstrate(task, environments(sandboxes), chat, ROOMY))
