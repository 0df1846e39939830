"""The simulator against what can be worked out by hand, and against a run of the same loop."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ale.config import AgentConfig, AlgorithmConfig, ModelConfig, RolloutConfig, RunConfig
from ale.data.events import GroupOpened, RolloutDropped, RolloutKept, RolloutStarted
from ale.data.journal import Journal
from ale.errors import ConfigError, RunFolderError
from ale.messages import Chunk, Trajectory
from ale.simulation import Episode, Lognormal, Node, Prediction, Recorded, simulate
from ale.wire import Array


class Fixed(msgspec.Struct):
    """Every episode is the same, but for its reward."""

    seconds: float
    tokens: int = 8

    def draw(self, rng: random.Random) -> Episode:
        return Episode(tools_s=self.seconds, tokens=self.tokens, reward=1.0)


def configured(model: ModelConfig | None = None, **rollout: Any) -> RunConfig:
    settings = {"group_size": 1, "groups_per_step": 4, "max_lag": 0, "concurrency": 64}
    return RunConfig(
        rollout=RolloutConfig(**settings | rollout),
        algorithm=AlgorithmConfig(baseline="none"),
        agent=AgentConfig(episode_timeout_s=1e6),
        model=model or ModelConfig(),
    )


def test_synchronous_training_takes_episode_update_and_sync_one_after_the_other() -> None:
    seen = simulate(configured(), Node(step_s=5.0, sync_s=1.0), Fixed(10.0), updates=20)
    assert seen.seconds == pytest.approx(20 * 16.0)
    assert seen.episodes_per_hour == pytest.approx(4 / 16 * 3600)
    assert seen.trainer_bubble == pytest.approx(10 / 16)
    assert seen.places_bubble == pytest.approx(1 - 4 * 10 / (64 * 16))
    assert (seen.lag_mean, seen.lag_max, seen.dropped) == (0.0, 0, {})


def test_with_lag_the_slower_of_rollouts_and_updates_sets_the_pace() -> None:
    seen = simulate(configured(max_lag=2), Node(step_s=5.0), Fixed(2.0), updates=20)
    assert seen.seconds == pytest.approx(20 * 5.0)
    assert seen.trainer_bubble == pytest.approx(0.0, abs=1e-6)
    assert 1 <= seen.lag_max <= 2
    seen = simulate(configured(max_lag=2, concurrency=4), Node(step_s=1.0), Fixed(10.0), updates=20)
    assert seen.updates_per_hour == pytest.approx(360, rel=0.05)
    assert seen.places_bubble == pytest.approx(0.0, abs=0.05)


def test_an_engine_is_shared_by_those_who_generate() -> None:
    node = Node(token_s=0.1, row_s=0.05, step_s=1.0)
    alone = simulate(configured(groups_per_step=1), node, Fixed(0.0, tokens=80), updates=10)
    four = simulate(configured(groups_per_step=4), node, Fixed(0.0, tokens=80), updates=10)
    assert alone.seconds == pytest.approx(10 * (80 * 0.15 + 1))
    assert four.seconds == pytest.approx(10 * (80 * 0.30 + 1))
    assert four.engine_bubble == pytest.approx(1 / 25)
    one_row = simulate(configured(groups_per_step=4, engine_rows=1), node, Fixed(0.0, tokens=80), updates=10)
    assert one_row.seconds == pytest.approx(10 * (4 * 80 * 0.15 + 1))


def test_a_pool_gives_the_engine_what_the_trainer_does_not_use() -> None:
    """Half of the engine while an update is made: what is generated meanwhile takes twice as long."""
    node = Node(token_s=0.1, step_s=4.0)
    pool = ModelConfig(pool=2, threads=1)
    alone = simulate(configured(max_lag=1, groups_per_step=1), node, Fixed(0.0, tokens=80), updates=20)
    shared = simulate(configured(pool, max_lag=1, groups_per_step=1), node, Fixed(0.0, tokens=80), updates=20)
    # two groups under way, 8 s each with the whole engine; of 12 s a shared one spends 4 s at half speed
    assert alone.seconds < shared.seconds < 1.5 * alone.seconds


def test_asynchrony_pays_where_the_tail_is_long_and_the_lag_stays_in_bounds() -> None:
    sampler = Lognormal(median_s=4.0, tail=20.0, crashes=0.02, solved=0.5)
    node = Node(token_s=0.002, row_s=0.0002, step_s=3.0, sync_s=0.1)
    seen: dict[int, Prediction] = {
        lag: simulate(configured(groups_per_step=16, concurrency=16, max_lag=lag), node, sampler, updates=12)
        for lag in (0, 2)
    }
    assert seen[2].episodes_per_hour > 1.8 * seen[0].episodes_per_hour
    assert seen[0].lag_max == 0
    assert seen[2].lag_max <= 2
    assert seen[2].places_bubble < seen[0].places_bubble
    assert 0.005 < seen[2].dropped["sandbox_failure"] < 0.04


def test_redundancy_helps_a_synchronous_run_against_its_tail() -> None:
    sampler = Lognormal(median_s=4.0, tail=20.0, solved=1.0)
    node = Node(step_s=3.0)
    plain = simulate(configured(groups_per_step=16, concurrency=64), node, sampler, updates=15)
    extra = simulate(configured(groups_per_step=16, concurrency=64, extra_groups=8), node, sampler, updates=15)
    assert extra.updates_per_hour > 1.5 * plain.updates_per_hour
    assert extra.dropped["redundant"] == pytest.approx(1 / 3, abs=0.02)


def test_the_same_seed_predicts_the_same() -> None:
    arguments = (configured(max_lag=1), Node(), Lognormal(solved=0.7))
    assert simulate(*arguments, updates=10) == simulate(*arguments, updates=10)


def test_episodes_that_never_make_a_batch_are_an_error() -> None:
    config = configured(groups_per_step=1)
    with pytest.raises(ConfigError, match="episodes like these never make a batch"):
        simulate(config, Node(), Lognormal(solved=0.0, tail=1.0), updates=1)


def test_the_lognormal_has_the_median_and_the_tail_that_it_says() -> None:
    sampler, rng = Lognormal(median_s=3.0, tail=20.0), random.Random(0)
    drawn = sorted(sampler.seconds(rng) for _ in range(40_000))
    assert statistics.median(drawn) == pytest.approx(3.0, rel=0.03)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(60.0, rel=0.1)
    assert statistics.fmean(drawn) == pytest.approx(sampler.mean_s, rel=0.05)


@pytest.mark.parametrize("wrong", [{"median_s": 0}, {"tail": 0.5}, {"crashes": 1.0}, {"solved": 1.5}, {"turns": 0}])
def test_a_distribution_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"a lognormal latency needs|are shares"):
        Lognormal(**wrong)  # type: ignore[arg-type]


def kept(number: int) -> Trajectory:
    flat = Array.of([-1.0] * 6, "float32")
    return Trajectory(
        id=f"g1/{number}",
        group="g1",
        task="t",
        family="copy",
        level=1,
        tokens_T=Array.of(range(7), "int32"),
        chunks=(Chunk(1, 4, "call"), Chunk(4, 7, "answer")),
        logp_A=flat,
        logp_sampled_A=flat,
        version_A=Array.of([0] * 6, "int32"),
        reward=float(number % 2),
        duration_s=3.0 + number,
    )


def test_a_run_is_drawn_from_with_its_failures(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write(GroupOpened(group="g1", task="t", drawn=1))
    for number in range(12):
        journal.write(RolloutStarted(rollout=f"g1/{number}"))
        if number < 9:
            journal.write(RolloutKept(trajectory=kept(number), solved=bool(number % 2)))
        else:
            journal.write(RolloutDropped(rollout=f"g1/{number}", reason="sandbox_failure"))
    journal.write(RolloutDropped(rollout="g1/99", reason="redundant"))  # says nothing about the environment
    journal.close()
    before = (tmp_path / "journal").read_bytes()
    recorded, rng = Recorded(tmp_path), random.Random(1)
    assert (tmp_path / "journal").read_bytes() == before
    assert recorded.failing == 0.25
    drawn = [recorded.draw(rng) for _ in range(4000)]
    assert {e.tools_s for e in drawn} == {3.0 + n for n in range(9)}
    assert {(e.tokens, e.turns) for e in drawn} == {(6, 2)}
    assert sum(e.status == "sandbox_failure" for e in drawn) / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run to simulate"):
        Recorded(tmp_path)
    Journal(tmp_path / "journal").close()
    with pytest.raises(RunFolderError, match="has kept no episode yet"):
        Recorded(tmp_path)
