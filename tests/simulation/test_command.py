"""`ale simulate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ale.cli import app
from ale.errors import RunFolderError, UserError

SMALL = """
[rollout]
group_size = 1
groups_per_step = 2
concurrency = 4
[algorithm]
baseline = "none"
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "small.toml").write_text(SMALL)
    return str(tmp_path / "small.toml")


def test_a_sweep_has_a_line_for_each_value(config: str) -> None:
    done = CliRunner().invoke(
        app, ["simulate", config, "--updates", "5", "--sweep", "rollout.max_lag=0,2", "--step-s", "2", "--json"]
    )
    assert done.exit_code == 0, done.output
    lines = json.loads(done.output)
    assert [line["settings"] for line in lines] == ["rollout.max_lag=0", "rollout.max_lag=2"]
    assert lines[1]["episodes_per_hour"] > lines[0]["episodes_per_hour"]
    assert lines[0]["lag_max"] == 0


def test_a_person_gets_tables(config: str) -> None:
    done = CliRunner().invoke(app, ["simulate", config, "--updates", "3"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    for words in ("predicted over 3 updates", "trainer idle", "zero advantage", "small"):
        assert words in done.output


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["--sweep", "rollout.max_lag"], UserError, "is not of the form section.field=a,b,c"),
        (["--sweep", "a.b=" + ",".join("1" * 65)], UserError, "65 combinations are more than 64"),
        (["--tail", "0.1"], UserError, "a tail of at least 1"),
        (["--from", "nowhere"], RunFolderError, "nowhere holds no run to simulate"),
    ],
)
def test_a_mistake_is_told(config: str, arguments: list[str], kind: type[Exception], said: str) -> None:
    done = CliRunner().invoke(app, ["simulate", config, *arguments])
    assert isinstance(done.exception, kind)
    assert said in str(done.exception)
