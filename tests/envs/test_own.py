import asyncio
import math
from itertools import islice
from typing import Any

import pytest

from ale.config import TasksConfig
from ale.envs.env import Env, Step
from ale.envs.own import PATIENCE, own_reward, own_source
from ale.errors import ConfigError, EvaluatorError, SandboxError
from ale.messages import Score, ToolResult, Trajectory
from ale.task import Task
from ale.wire import Array

NONE = Array.of([], "float32")
TRAJECTORY = Trajectory(
    id="g/0",
    group="g",
    task="t",
    family="f",
    level=1,
    tokens_T=NONE,
    chunks=(),
    logp_A=NONE,
    logp_sampled_A=NONE,
    version_A=NONE,
)


class Count:
    """Counts to three; each step is worth a tenth of the action."""

    def __init__(self, task: Task) -> None:
        self.seed = task.seed
        self.steps = 0

    def reset(self) -> Any:
        return f"seed {self.seed}"

    def step(self, action: str) -> Any:
        self.steps += 1
        return Step(f"saw {action}", reward=float(action) / 10, terminated=self.steps == 3)


class AsyncCount(Count):
    async def reset(self) -> Any:
        return super().reset()

    async def step(self, action: str) -> Any:
        await asyncio.sleep(0)
        return super().step(action)


def env(environment: Any, seed: int = 4) -> Env:
    source = own_source([Task(id="t", seed=seed)], environment, TasksConfig(heldout=0), 0)
    assert source is not None
    assert source.make_env is not None
    return source.make_env(next(source.train))


@pytest.mark.parametrize("environment", [Count, AsyncCount])
def test_an_environment_is_played_whether_its_methods_wait_or_not(environment: Any) -> None:
    async def play() -> None:
        game = env(environment)
        assert await game.reset() == "seed 4"
        steps = [await game.step(action) for action in "123"]
        assert [step.terminated for step in steps] == [False, False, True]
        assert steps[0].result == ToolResult(call="1", output="saw 1", exit_code=0)
        assert (await game.score()).reward == pytest.approx(0.6)
        await game.close()
        await game.close()

    asyncio.run(play())


def test_an_environment_that_scores_itself_is_asked_at_the_end_and_closed_once() -> None:
    closed = []

    class Scored(Count):
        async def score(self) -> Score:
            return Score(reward=0.75)

        def close(self) -> None:
            closed.append(self)

    async def play() -> float:
        game = env(Scored)
        await game.reset()
        score = await game.score()
        await game.close()
        await game.close()
        return score.reward

    assert asyncio.run(play()) == 0.75
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: ("seen", 1.0), "step() returns ale.Step"),
        (lambda: Step(7), "step() returns ale.Step"),  # type: ignore[arg-type]
        (lambda: Step("seen", reward=math.nan), "a reward is a finite number"),
    ],
)
def test_a_step_that_fails_is_a_failure_of_the_environment(answer: Any, said: str) -> None:
    class Broken(Count):
        def step(self, action: str) -> Any:
            return answer()

    async def play() -> None:
        game = env(Broken)
        await game.reset()
        await game.step("1")

    with pytest.raises(SandboxError, match="the environment Broken") as error:
        asyncio.run(play())
    assert said in str(error.value)


def test_an_instruction_that_is_no_text_is_a_failure_of_the_environment() -> None:
    class Silent(Count):
        def reset(self) -> Any:
            return None

    with pytest.raises(SandboxError, match=r"reset\(\) returns what the agent is told"):
        asyncio.run(env(Silent).reset())


@pytest.mark.parametrize("value", [1, 0.5, True, Score(reward=0.25)])
def test_a_reward_is_a_number_however_it_is_written(value: Any) -> None:
    async def waits(trajectory: Trajectory) -> Any:
        return value

    expected = value.reward if isinstance(value, Score) else float(value)
    for function in (waits, lambda trajectory: value):
        assert asyncio.run(own_reward(function)(TRAJECTORY)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1.0", [1.0]])
def test_what_is_no_finite_number_is_an_error_of_the_evaluator_and_no_reward(value: Any) -> None:
    with pytest.raises(EvaluatorError, match="the reward function"):
        asyncio.run(own_reward(lambda trajectory: value)(TRAJECTORY))


def test_a_reward_function_that_raises_is_an_error_of_the_evaluator_with_its_cause() -> None:
    def judge(trajectory: Trajectory) -> float:
        raise KeyError("answer")

    with pytest.raises(EvaluatorError, match=r"the reward function judge: KeyError: 'answer'") as error:
        asyncio.run(own_reward(judge)(TRAJECTORY))
    assert isinstance(error.value.__cause__, KeyError)


def test_code_that_never_worked_is_a_mistake_of_the_program() -> None:
    judge = own_reward(lambda trajectory: 1 / 0)

    async def fail() -> None:
        for _ in range(PATIENCE - 1):
            with pytest.raises(EvaluatorError):
                await judge(TRAJECTORY)
        await judge(TRAJECTORY)

    with pytest.raises(ConfigError, match=r"ZeroDivisionError.*failed 16 times and never worked") as error:
        asyncio.run(fail())
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_code_that_has_worked_once_may_fail_as_often_as_it_likes() -> None:
    answers = iter([1.0])
    judge = own_reward(lambda trajectory: next(answers))

    async def fail() -> None:
        await judge(TRAJECTORY)
        for _ in range(3 * PATIENCE):
            with pytest.raises(EvaluatorError):
                await judge(TRAJECTORY)

    asyncio.run(fail())


def test_a_cancelled_call_is_no_failure() -> None:
    async def forever(trajectory: Trajectory) -> float:
        await asyncio.Event().wait()
        return 0.0

    async def cancel() -> None:
        judge = own_reward(forever)
        for _ in range(PATIENCE + 1):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await judge(TRAJECTORY)

    asyncio.run(cancel())


def test_an_environment_without_tasks_gets_numbers_that_are_never_held_out() -> None:
    config = TasksConfig(heldout=3)
    runs = [own_source(None, Count, config, seed) for seed in (0, 1)]
    numbers = [[task.seed for task in islice(source.train, 50)] for source in runs if source is not None]
    assert runs[0] is not None
    heldout = runs[0].heldout
    assert [(task.seed, task.split, task.actions) for task in heldout] == [(n, "heldout", "text") for n in range(3)]
    assert len({*numbers[0], *numbers[1], *(task.seed for task in heldout)}) == 103
    assert heldout[0].family == "count"


def test_a_programs_tasks_are_split_and_their_turns_are_actions() -> None:
    source = own_source([Task(id=str(n)) for n in range(5)], Count, TasksConfig(heldout=2), 0)
    assert source is not None
    drawn = {task.id for task in islice(source.train, 30)}
    held = {task.id for task in source.heldout}
    assert (len(drawn), len(held), drawn & held) == (3, 2, set())
    assert next(source.train).actions == "text"


def test_tasks_without_an_environment_are_for_the_terminal() -> None:
    source = own_source([Task(id="a"), Task(id="b")], None, TasksConfig(heldout=1), 0)
    assert source is not None
    assert (source.make_env, next(source.train).actions) == (None, "bash")
    assert own_source(None, None, TasksConfig(), 0) is None


@pytest.mark.parametrize(
    ("tasks", "said"), [(["a", "b", "a"], "two of them have the id 'a'"), (["a", "b"], "tasks.heldout is 2")]
)
def test_tasks_that_cannot_be_split_are_refused(tasks: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        own_source([Task(id=id_) for id_ in tasks], Count, TasksConfig(heldout=2), 0)
