"""The adapter to GEM's API. Most of it plays a game defined here; what needs gem-llm itself is skipped without it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import random
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ale.config import TasksConfig
from ale.config_file import load
from ale.envs.env import Env
from ale.envs.gem import INSTALL, Game, gem_source
from ale.envs.gem_players import guess_the_number, player_for
from ale.envs.source import Source, open_source
from ale.errors import ConfigError, SandboxError, UserError
from ale.task import Task

HARD = "game:GuessTheNumber-v0-hard"
EXAMPLE = Path(__file__).parents[2] / "examples" / "gem.toml"


class Dice:
    """GEM's API: says what it throws, with both kinds of global randomness; ends at "stop", or after three throws."""

    def __init__(self, seed: int) -> None:
        self.turns = 0

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        random.seed(seed)
        np.random.seed(seed)
        return f"Throw. First: {random.randint(1, 6)}", {"suffix": "Your turn."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "break":
            raise ValueError("a die is lost")
        self.turns += 1
        thrown = f"{random.random()} {np.random.randint(1 << 30)}"
        return thrown, 0.25, action == "stop", self.turns == 3, {"prefix": "It is ", "suffix": "!"}


class Sum:
    """One question of nine, so that many seeds ask the same one."""

    def __init__(self, seed: int) -> None:
        self.a, self.b = seed % 3, seed // 3 % 3

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return f"{self.a}+{self.b}=", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", float(action == str(self.a + self.b)), True, True, {}


def dice(heldout: int = 5, seed: int = 0) -> Source:
    return gem_source(Dice, "game:Dice", TasksConfig(source="gem:game:Dice", heldout=heldout), seed)


def env_of(source: Source, task: Task) -> Env:
    assert source.make_env is not None
    return source.make_env(task)


async def throws(env: Env, n: int) -> list[str]:
    return [await env.reset(), *[(await env.step("throw")).observation for _ in range(n)]]


def test_a_seed_and_the_actions_decide_an_episode_however_many_run_at_once() -> None:
    async def scenario() -> None:
        source = dice()
        one, two = source.heldout[:2]
        alone = [await throws(env_of(source, task), 3) for task in (one, two)]
        assert alone[0] != alone[1]
        envs = [env_of(source, task) for task in (one, two, one, two)]
        together = await asyncio.gather(*(throws(env, 3) for env in envs))
        assert together == alone * 2

    asyncio.run(scenario())


def test_the_random_numbers_of_the_program_are_left_alone() -> None:
    random.seed(7)
    np.random.seed(7)
    expected = random.random(), np.random.random()
    random.seed(7)
    np.random.seed(7)
    game = Game(Dice, 3)
    game.reset()
    game.step("throw")
    with pytest.raises(ValueError, match="a die is lost"):
        game.step("break")
    assert (random.random(), np.random.random()) == expected


def test_an_episode_ends_where_the_environment_says_and_its_reward_is_the_sum() -> None:
    async def scenario() -> None:
        source = dice()
        env = env_of(source, source.heldout[0])
        assert re.fullmatch(r"Throw. First: \d\nYour turn\.", await env.reset())
        first = await env.step("throw")
        assert re.fullmatch(r"It is \S+ \d+\n!", first.observation)
        assert (first.terminated, first.result.call if first.result else "") == (False, "throw")
        assert (await env.step("stop")).terminated  # "terminated"
        assert (await env.score()).reward == 0.5
        await env.close()
        await env.close()
        again = env_of(source, source.heldout[0])
        await again.reset()
        assert [(await again.step("throw")).terminated for _ in range(3)] == [False, False, True]  # "truncated"

    asyncio.run(scenario())


def test_an_error_in_the_environment_is_not_a_reward() -> None:
    async def scenario() -> None:
        source = dice()
        env = env_of(source, source.heldout[0])
        await env.reset()
        with pytest.raises(SandboxError, match=r"game:Dice: ValueError: a die is lost"):
            await env.step("break")
        await env.close()

    asyncio.run(scenario())


def test_held_out_seeds_are_fixed_and_never_played_in_training() -> None:
    source = dice(heldout=20)
    played = list(islice(source.train, 200))
    assert not {t.seed for t in played} & {t.seed for t in source.heldout}
    assert len({t.seed for t in source.heldout}) == 20
    assert {t.seed for t in dice(heldout=20, seed=1).heldout} == {t.seed for t in source.heldout}
    assert [t.seed for t in islice(dice(seed=1).train, 5)] != [t.seed for t in played[:5]]
    assert {(t.split, t.actions, t.family) for t in played} == {("train", "text", "Dice")}
    assert {t.split for t in source.heldout} == {"heldout"}


def test_a_question_that_reads_like_a_held_out_one_is_not_asked_in_training() -> None:
    source = gem_source(Sum, "rg:sum", TasksConfig(heldout=4), 0)
    held = {t.instruction for t in source.heldout}
    asked = {t.instruction for t in islice(source.train, 100)}
    assert len(asked | held) == 9
    assert not asked & held


class Echo:
    """The words of guess-the-number, with the number 12."""

    def __init__(self, turns: int) -> None:
        self.left = turns

    def reset(self) -> str:
        return "You have to guess the number between 1 and 50 (inclusive)"

    def step(self, action: str) -> Any:
        from ale.envs.env import Step

        self.left -= 1
        guess = int(action.removeprefix("\\boxed{").removesuffix("}"))
        if guess == 12:
            return Step("Congratulations!", 1.0, terminated=True)
        said = f"the target number is {'lower' if guess > 12 else 'higher'} than {guess}."
        return Step(said, 0.9 if self.left == 0 else 0.0, terminated=self.left == 0)


def test_the_player_finds_the_number_and_shows_no_game_that_it_lost() -> None:
    for seed in range(20):
        turns = guess_the_number(Echo(50), random.Random(seed))
        assert turns[-1] == "\\boxed{12}"
        assert len(set(turns)) == len(turns)
        assert guess_the_number(Echo(len(turns) - 1 or 1), random.Random(seed)) in ((), turns)
    assert guess_the_number(Echo(1), random.Random(0)) == ()
    assert player_for(HARD) is guess_the_number
    assert player_for("game:Sokoban-v0-easy") is None


def test_a_missing_package_is_answered_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gem", None)
    with pytest.raises(UserError, match=re.escape(INSTALL)):
        open_source(TasksConfig(source=f"gem:{HARD}"), 0)


def test_the_example_loads_and_names_the_packages_it_needs() -> None:
    assert load(EXAMPLE).tasks.source == "gem:game:GuessTheNumber-v0-easy"
    assert INSTALL in EXAMPLE.read_text()


@pytest.fixture
def gem() -> None:
    if importlib.util.find_spec("gem") is None:
        pytest.skip(f"gem-llm is not installed: {INSTALL}")


@pytest.mark.usefixtures("gem")
@pytest.mark.filterwarnings("default")  # theirs
class TestGemItself:
    def test_guess_the_number_is_played_and_demonstrated(self) -> None:
        source = open_source(TasksConfig(source=f"gem:{HARD}", heldout=3), 0)
        shown = [t for t in islice(source.train, 40) if t.solution]
        assert 20 < len(shown) < 40
        assert max(len(t.solution) for t in shown) <= 7

        async def play(task: Task) -> float:
            env = env_of(source, task)
            assert await env.reset() == task.instruction
            steps = [await env.step(turn) for turn in task.solution]
            assert [s.terminated for s in steps] == [False] * (len(steps) - 1) + [True]
            return (await env.score()).reward

        async def scenario() -> None:
            assert [await play(t) for t in shown[:5]] == [1.0] * 5

        asyncio.run(scenario())
        assert "between 1 and 50" in source.heldout[0].instruction

    def test_questions_of_reasoning_gym_differ_from_seed_to_seed(self) -> None:
        source = open_source(TasksConfig(source="gem:rg:basic_arithmetic", heldout=8), 0)
        assert len({t.instruction for t in source.heldout}) == 8

    def test_importing_it_leaves_the_logging_of_the_program_alone(self) -> None:
        before = logging.getLogger().handlers[:]
        open_source(TasksConfig(source=f"gem:{HARD}", heldout=1), 0)
        assert logging.getLogger().handlers == before

    def test_an_unknown_environment_is_answered_with_those_that_exist(self) -> None:
        with pytest.raises(ConfigError, match=r"no environment 'game:Chess'.*game:GuessTheNumber-v0-easy"):
            open_source(TasksConfig(source="gem:game:Chess"), 0)

    def test_an_environment_whose_packages_are_missing_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match="datasets"):
            open_source(TasksConfig(source="gem:math:GSM8K"), 0)
