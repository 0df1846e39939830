import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ale.config import RunConfig
from ale.config_file import dump, load, parse
from ale.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_defaults_named_after_the_file(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == RunConfig(name="mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sed = 1", "there is no field sed; did you mean seed?"),
        ("[learner]\nlearning_rat = 1", "there is no field learner.learning_rat; did you mean learner.learning_rate?"),
        ("[rolout]\n", "there is no field rolout; did you mean rollout?"),
        ("[rollout]\nzzz = 1", "there is no field rollout.zzz; there are: group_size, groups_per_step"),
        ("seed = 'one'", "field seed: Expected `int`, got `str`"),
        ("[model]\nthreads = 1.5", "field model.threads: Expected `int`, got `float`"),
        ("[learner]\nlearning_rate = true", "field learner.learning_rate: Expected `float`, got `bool`"),
        ("[sandbox]\nkind = 'docker'", 'sandbox.kind = "docker" needs sandbox.image'),
        ("[sandbox]\nimage = 'debian'", 'need sandbox.kind = "docker", not "local"'),
        ("rollout = 3", "field rollout: Expected `object`, got `int`"),
        ("[algorithm]\nobjective = 'ppo'", "field algorithm.objective: Invalid enum value 'ppo'"),
        ("[warm_start.by_family]\ncopy = 'x'", "warm_start.by_family[...]: Expected `int`, got `str`"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size is 1"),
        ("[rollout]\ngroup_size = 0", "rollout.group_size must be positive, got 0"),
        ("[rollout]\nmax_lag = -1", "rollout.max_lag must not be negative, got -1"),
        ("[rollout]\ntemperature = 0.0", "rollout.temperature must be positive"),
        ("[rollout]\ntop_p = 0.0", "rollout.top_p must be above 0 and at most 1, got 0.0"),
        ("[rollout]\nextra_members = -1", "rollout.extra_members must not be negative, got -1"),
        ("[rollout]\nextra_groups = 2\non_stale = 'wait'", 'use on_stale = "discard", or no extra groups'),
        ("[rollout]\nstraggler_s = 0.0", "rollout.straggler_s must be positive and finite, got 0.0"),
        ("[rollout]\nstraggler_factor = 1.5", "rollout.straggler_factor must be at least 2, got 1.5"),
        ("[rollout]\nengine_rows = 0", "rollout.engine_rows must be positive, got 0"),
        ("[model]\nthreads = 2\npool = 2", "model.pool is 2, but an update takes model.threads = 2 of it"),
        ("[model]\npool = 2\n[learner]\nranks = 2", "model.threads = 1 for each of 2 ranks of it"),
        ("[tasks]\nsource = 'hub:a'\nonly = ['copy']", 'tasks.source is "hub:a": leave one of them out'),
        ("[metrics]\nprometheus_port = 70000", "metrics.prometheus_port must be a port, 1 to 65535, or 0 for none"),
        ("[rollout]\ntop_k = 0", "rollout.top_k must be at least 1"),
        ("[learner]\nlearning_rate = nan", "learner.learning_rate must not be negative, got nan"),
        ("[learner]\nlearning_rate = inf", "learner.learning_rate must be finite, got inf"),
        ("[learner]\nmax_grad_norm = nan", "learner.max_grad_norm must be positive, got nan"),
        ("[tasks]\nheldout = -1", "tasks.heldout must not be negative, got -1"),
        ("[eval]\ntemperature = -0.1", "eval.temperature must not be negative, got -0.1"),
        ("[sandbox]\nmemory_mb = 0", "sandbox.memory_mb must be positive, got 0"),
        (
            "[policy]\nkind = 'server'",
            'policy.kind = "server" and policy.urls, the addresses of the servers, need each',
        ),
        (
            "[policy]\nurls = ['http://a']",
            'policy.kind = "server" and policy.urls, the addresses of the servers, need each',
        ),
        (
            "[policy]\nkind = 'vllm'\ndevices = ['0', '1']",
            "policy.devices names those of 2 replicas, policy.replicas is",
        ),
        ("[policy]\nkind = 'vllm'\nreplicas = 0", "policy.replicas must be positive, got 0"),
        ("[policy]\nkind = 'vllm'\nrestarts = -1", "policy.restarts must not be negative, got -1"),
        ("[policy]\nkind = 'vllm'\n[rollout]\ntop_k = 9", 'rollout.top_k cannot be had with policy.kind = "vllm"'),
        ("[policy]\nkind = 'vllm'\n[model]\npool = 3", 'model.pool needs policy.kind = "embedded", not "vllm"'),
        ("[policy]\nkind = 'vllm'\n[algorithm]\nrouting_replay = true", 'needs policy.kind = "embedded", not "vllm"'),
        ("seed = ", "is not valid TOML"),
    ],
)
def test_every_error_names_the_file_and_the_field(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_not_readable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*nowhere.toml"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match=r"latin.toml cannot be read"):
        load(tmp_path / "latin.toml")


def test_overrides_beat_the_file_and_take_toml_or_bare_words(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 1\n[rollout]\nmax_lag = 2\n")
    config = load(
        path,
        ["seed=7", "rollout.max_lag=0", "learner.learning_rate = 1e-4", "name= blue", "warm_start.by_family.copy=3"],
    )
    assert (config.seed, config.rollout.max_lag, config.learner.learning_rate) == (7, 0, 1e-4)
    assert config.name == "blue"
    assert config.warm_start.by_family == {"copy": 3}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "'seed' is not of the form section.field=value"),
        ("=1", "'=1' is not of the form"),
        ("seed.deep=1", "goes into 'seed', which is a value"),
        ("rollout.max_lagg=1", "did you mean rollout.max_lag?"),
        ("rollout.max_lag=soon", "field rollout.max_lag: Expected `int`, got `str`"),
    ],
)
def test_a_wrong_override_is_refused_by_name(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "seed = 1"), [override])
    assert said in str(caught.value)


def test_a_group_of_one_is_fine_where_nothing_is_compared() -> None:
    tree = {"rollout": {"group_size": 1}, "algorithm": {"baseline": "signed"}}
    assert parse(tree).rollout.group_size == 1


def valid(kind: Any) -> st.SearchStrategy[Any]:
    """Values that any field of this type takes: positive, and within every bound."""
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(2, 10**6),
        float: st.floats(1e-6, 1.0),
        bool: st.booleans(),
        str: st.text(max_size=8),
        dict[str, int]: st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=3),
        int | None: st.none() | st.integers(1, 99),
        float | None: st.none() | st.floats(1e-6, 1.0),
    }
    return strategies.get(kind, st.nothing())


# These have bounds of their own.
BOUNDED: dict[str, st.SearchStrategy[Any]] = {
    "pool": st.none() | st.integers(10**12 + 1, 10**13),  # threads times ranks
    "prometheus_port": st.integers(0, 65535),
    "straggler_factor": st.none() | st.floats(2.0, 100.0),
}


def trees(struct: Any) -> st.SearchStrategy[dict[str, Any]]:
    fields = {}
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            fields[field.name] = trees(field.type)
        elif field.name in BOUNDED:
            fields[field.name] = BOUNDED[field.name]
        elif not valid(field.type).is_empty:
            fields[field.name] = valid(field.type)
    if struct is RunConfig:
        fields["name"] = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,7}", fullmatch=True)
    return st.fixed_dictionaries({}, optional=fields)


@given(trees(RunConfig))
def test_what_is_dumped_parses_to_the_same_configuration(tree: dict[str, Any]) -> None:
    config = parse(tree)
    assert parse(json.loads(dump(config))) == config
    for name, value in tree.items():
        section = getattr(config, name)
        assert section == value or all(getattr(section, key) == inner for key, inner in value.items())
