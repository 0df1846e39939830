"""The first difference of two runs, by what their folders say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ale.data.run_log import RunLog
from ale.diff import difference


def row(id_: str, update: int, **more: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "group": id_.split("/")[0],
        "task": "copy-1",
        "family": "copy",
        "level": 1,
        "chunks": [[2, 4, "answer"]],
        "reward": 1.0,
        "status": "scored",
        "duration_s": 0.5,
        "update": update,
        "tokens_T": [1, 2, 3, 4],
        "logp_A": [-1.0, -2.0],
        "logp_sampled_A": [-1.0, -2.0],
        "version_A": [0, 0],
        "results": [],
        "answer": "done",
        "cause": None,
        "started_version": 0,
    } | more


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "one"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"name": "one", "seed": 3, "rollout": {"max_lag": 1}}))
    lines = [{"evaluation": "heldout_before", "success": 0.25}, *({"update": n, "loss": 0.5 * n} for n in (1, 2, 3))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [row(f"g{n}/{k}", n) for n in (1, 2, 3) for k in (0, 1)]
    (path / "trajectories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def altered(one: Path, name: str, line: int, **values: Any) -> Path:
    """A copy in which one line of a file says something else."""
    other = one.with_name("other")
    shutil.copytree(one, other)
    lines = [json.loads(text) for text in (other / name).read_text().splitlines()]
    lines[line] |= values
    (other / name).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return other


def first(one: Path, other: Path) -> tuple[int, str | None]:
    found = difference(RunLog(one), RunLog(other))
    return found.updates, found.first


def test_a_run_does_not_differ_from_itself_nor_by_what_the_clock_says(one: Path) -> None:
    assert first(one, altered(one, "trajectories.jsonl", 3, duration_s=9.5)) == (3, None)


@pytest.mark.parametrize(
    ("file", "line", "values", "said"),
    [
        ("trajectories.jsonl", 2, {"id": "g7/0"}, "update 2, batch: member [0]: 'g2/0', and 'g7/0'"),
        ("trajectories.jsonl", 3, {"tokens_T": [1, 2, 9, 4]}, "update 2, trajectory g2/1: tokens_T[2]: 3, and 9"),
        ("trajectories.jsonl", 3, {"version_A": [0, 1]}, "update 2, trajectory g2/1: version_A[1]: 0, and 1"),
        ("trajectories.jsonl", 2, {"reward": 0.5}, "update 2, trajectory g2/0: reward: 1.0, and 0.5"),
        ("metrics.jsonl", 2, {"loss": 1.1}, "update 2, loss: 1.0, and 1.1"),
        ("metrics.jsonl", 0, {"success": 0.5}, "evaluation heldout_before: 0.25, and 0.5"),
    ],
)
def test_the_first_difference_is_named(one: Path, file: str, line: int, values: dict[str, Any], said: str) -> None:
    other = altered(one, file, line, **values)
    assert first(one, other) == (0 if "evaluation" in said else 1, said)


def test_a_loss_may_differ_by_a_millionth(one: Path) -> None:
    assert first(one, altered(one, "metrics.jsonl", 2, loss=1.0000005)) == (3, None)


def test_a_run_that_got_less_far_says_so(one: Path) -> None:
    other = altered(one, "metrics.jsonl", 2)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:3]))
    assert first(one, other) == (2, "one run has made 3 updates, the other 2; what both have made is the same")


def test_the_fields_of_the_configuration_that_differ_are_named_and_its_name_is_not(one: Path) -> None:
    other = altered(one, "metrics.jsonl", 0)
    (other / "config.json").write_text(json.dumps({"name": "other", "seed": 4, "rollout": {"max_lag": 1}}))
    assert difference(RunLog(one), RunLog(other)).config == {"seed": "3, and 4"}
