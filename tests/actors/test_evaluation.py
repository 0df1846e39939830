import asyncio

import pytest

from ale.actors.evaluation import evaluate_tasks, rate
from ale.bus import Bus
from ale.config import EvalConfig
from ale.messages import Rollout, Sampling, Trajectory
from ale.supervisor import Supervisor
from ale.testing.clock import run
from ale.testing.fakes import FakePolicy, Play, ScriptedEnvs
from ale.wire import Array

NOTHING = Array.of([], "int32")


def played(solved: int, n: int) -> list[Trajectory]:
    return [
        Trajectory(
            id=f"t{i}",
            group="g",
            task="t",
            family="copy",
            level=1,
            tokens_T=NOTHING,
            chunks=(),
            logp_A=NOTHING,
            logp_sampled_A=NOTHING,
            version_A=NOTHING,
            reward=float(i < solved),
        )
        for i in range(n)
    ]


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3: Wilson's interval for 81/263, 15/148, 0/20 and 1/29.
@pytest.mark.parametrize(
    ("solved", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(solved: int, n: int, low: float, high: float) -> None:
    result = rate(played(solved, n), EvalConfig())
    assert (result.success, result.n) == (solved / n, n)
    assert result.ci95 == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_full_success_ends_at_one() -> None:
    assert rate(played(20, 20), EvalConfig()).ci95[1] == 1.0


def evaluated(script, tasks, config, done=lambda n: None):
    """What an evaluation saw, and the rollouts that it asked for."""

    async def scenario():
        envs = ScriptedEnvs(script, FakePolicy(), concurrency=config.rollout.concurrency)
        bus = Bus(plain=True)
        async with Supervisor(bus) as supervisor:
            await supervisor.start(envs)
            return await evaluate_tasks(bus, config, tasks, "heldout", done), envs.received

    return run(scenario())


def test_an_evaluation_keeps_the_order_of_the_tasks_and_reports_n(with_tasks, small):
    told: list[int] = []
    tasks = with_tasks(20)
    seen, _ = evaluated(
        lambda r: Play(reward=float(r.task.id < "t15"), latency_s=20.0 - int(r.task.id[1:])), tasks, small, told.append
    )
    assert [t.task for t in seen] == [t.id for t in tasks]
    assert told == list(range(1, 21))
    assert rate(seen, EvalConfig()).n == 20


@pytest.mark.parametrize("status", ["sandbox_failure", "policy_failure", "evaluator_error"])
def test_an_evaluation_runs_an_infrastructure_failure_again(with_tasks, small, status):
    def script(rollout):
        first = rollout.id.endswith("/0")
        return Play(status=status, reward=None) if first else Play(reward=1.0)

    seen, asked = evaluated(script, with_tasks(6), small)
    assert rate(seen, EvalConfig()).success == 1.0
    assert len(asked) == 12


def test_a_task_that_never_runs_counts_as_not_solved(with_tasks, small):
    def script(rollout):
        return Play(status="sandbox_failure", reward=None) if rollout.task.id == "t0" else Play(reward=1.0)

    seen, asked = evaluated(script, with_tasks(4), small)
    assert (rate(seen, EvalConfig()).success, rate(seen, EvalConfig()).n) == (0.75, 4)
    assert [r.id for r in asked if r.task.id == "t0"] == [f"heldout/t0/{n}" for n in range(3)]


@pytest.mark.parametrize("status", ["episode_timeout", "illegal_tool_calls"])
def test_a_failure_of_the_agent_itself_is_not_run_again(with_tasks, small, status):
    seen, asked = evaluated(lambda r: Play(status=status, reward=None), with_tasks(3), small)
    assert len(asked) == 3
    assert rate(seen, EvalConfig()).success == 0.0


def test_a_bug_in_an_evaluated_episode_is_raised_as_it_was(with_tasks, small):
    with pytest.raises(ZeroDivisionError, match="a bug"):
        evaluated(lambda r: Play(error=ZeroDivisionError("a bug")), with_tasks(3), small)


def test_one_task_waits_for_the_episodes_of_training_that_fill_the_manager(with_tasks, small):
    """Every episode runs into its time-out: the evaluation's turn comes late, and it waits that long."""
    task = with_tasks(1)[0]
    limit_s = small.agent.episode_timeout_s

    async def scenario():
        envs = ScriptedEnvs(lambda r: Play(reward=1.0, latency_s=limit_s), FakePolicy(), concurrency=4)
        bus = Bus()
        async with Supervisor(bus) as supervisor, asyncio.TaskGroup() as training:
            await supervisor.start(envs)
            for n in range(16):
                rollout = Rollout(id=f"g/{n}", group="g", task=task, sampling=Sampling())
                training.create_task(bus.ask("envs", rollout, deadline_s=10 * limit_s))
            await asyncio.sleep(1.0)
            return await evaluate_tasks(bus, small, [task], "heldout")

    assert rate(run(scenario()), EvalConfig()).success == 1.0


def test_partial_credit_counts_as_solved_from_where_the_configuration_says() -> None:
    assert [EvalConfig().solved(r) for r in (None, -1.0, 0.0, 0.3, 1.0)] == [False, False, False, True, True]
    assert [EvalConfig(solved_at=1.0).solved(r) for r in (None, 0.9, 1.0)] == [False, False, True]
