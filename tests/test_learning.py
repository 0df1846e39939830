"""The whole loop, for real: sandboxes, engine process, learner process, weight sync. Success has to rise.

examples/nano.toml with one family of tasks, so that a short warm start is enough: two minutes on two cores.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest

from ale.config_file import load
from ale.pipeline import train
from ale.progress import Rate

ROOT = Path(__file__).parents[1]

# One family, whose reward teaches one thing: to copy two names out of the instruction into a command. A slow warm start
# and success as it is sampled, for both rise step by step: IPA begins at about a third.
SHORT = (
    *("tasks.only=['pack']", "tasks.selection=all", "tasks.heldout=100", "tasks.families=2", "agent.max_turns=4"),
    *("warm_start.by_family={pack=300}", "warm_start.learning_rate=5e-4", "warm_start.stop_at=0.3"),
    *("eval.temperature=1.0", "learner.updates=24"),
)


def z(before: Rate, after: Rate) -> float:
    """Of the difference of two proportions, in standard deviations."""
    assert before.n == after.n
    both = (before.success + after.success) / 2
    return (after.success - before.success) / math.sqrt(2 * both * (1 - both) / before.n)


@pytest.mark.timeout(900)
def test_the_agent_gets_better_at_tasks_it_has_never_seen(tmp_path: Path) -> None:
    overrides = [f"runs_dir={tmp_path}", "name=short", *SHORT]
    summary = asyncio.run(train(load(ROOT / "examples" / "nano.toml", overrides)))

    before, after = summary.heldout_before, summary.heldout_after
    assert before is not None
    assert after is not None
    assert before.n == after.n == 100
    assert z(before, after) > 3.1, (before, after)  # by chance once in a thousand times
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
