"""The whole loop, for real: sandboxes, engine process, learner process, weight sync. Success has to rise.

A shortened run of examples/nano.toml, two to three minutes on two cores.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ale.config_file import load
from ale.pipeline import train

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_the_agent_gets_better_at_tasks_it_has_never_seen(tmp_path: Path) -> None:
    # All tasks in turn: seeking out what still fails pays in a long run and makes the first updates slow.
    short = ["learner.updates=24", "tasks.selection=all", "tasks.heldout=100", "tasks.families=6"]
    overrides = [f"runs_dir={tmp_path}", "name=short", *short]
    summary = asyncio.run(train(load(ROOT / "examples" / "nano.toml", overrides)))

    before, after = summary.heldout_before, summary.heldout_after
    assert before.n == after.n == 100
    # One-sided two-proportion test at 1%, worst case of the variance: a rise of 16 points at n = 100 is not chance.
    assert after.success >= before.success + 0.16, (before, after)
    assert summary.lost_samples == 0
    assert summary.max_lag_seen <= summary.max_lag_allowed == 1
    folder = tmp_path / "short"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "update" in line]
    assert len(updates) == 24
    for line in updates:
        books = line["ledger"]
        assert books["started"] == books["trained"] + books["buffered"] + books["running"] + sum(
            books["dropped"].values()
        )
    assert sum(line["truth_exceptions"] for line in updates) <= 1e-4 * sum(line["action_tokens"] for line in updates)
    assert updates[-1]["loop_lag_p99_ms"] < 50
    assert (folder / "checkpoints" / "final" / "model.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["heldout_after"]["n"] == 100
