"""Asynchronous (max_lag 1) against synchronous (max_lag 0) training: episodes per hour of the nano job.

Both continue the same warm-started model with the same batch, concurrency, threads and cores. Only the training phase
is timed: waiting for a batch, the update, and the hand-over of the weights, of every update after the first three.
Two samples of different lag are told apart by the strict bound, which is checked first.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from pathlib import Path

from ale.config_file import load
from ale.pipeline import train
from ale.progress import Summary
from bench.harness import ROOT, benchmark

PAIRS, UPDATES, SKIPPED = 5, 18, 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = run(folder, "warm", "learner.updates=0", "tasks.heldout=20")
        model = f"model.path={Path(folder) / 'warm' / 'checkpoints' / 'final'}"
        numbers = itertools.count(1)

        def job(max_lag: int) -> tuple[Summary, float]:
            name = f"lag{max_lag}-{next(numbers)}"
            summary = run(
                folder,
                name,
                model,
                "warm_start.steps=0",
                "tasks.heldout=1",
                f"learner.updates={UPDATES}",
                f"rollout.max_lag={max_lag}",
            )
            lines = [json.loads(x) for x in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
            updates = [x for x in lines if "update" in x]
            first, last = updates[SKIPPED - 1], updates[-1]
            seconds = sum(x["wait_s"] + x["step_s"] + x["sync_s"] for x in updates[SKIPPED:])
            return summary, (finished(last) - finished(first)) / seconds * 3600

        with benchmark("lag", pairs=PAIRS) as bench:
            bench.check("the warm start solves some tasks", lambda: started.heldout_after.success > 0)
            bench.check("max_lag 0 trains on nothing old", lambda: job(0)[0].max_lag_seen == 0)
            bench.check("max_lag 1 trains on nothing older than one update", lambda: job(1)[0].max_lag_seen <= 1)
            bench.rate(
                "lag/episodes",
                ours=lambda: job(1)[1],
                baseline=lambda: job(0)[1],
                against="max_lag 0",
                unit="episodes/hour",
            )


def run(folder: str, name: str, *overrides: str) -> Summary:
    config = load(
        ROOT / "examples" / "nano.toml", [f"runs_dir={folder}", f"name={name}", "tasks.families=0", *overrides]
    )
    return asyncio.run(train(config))


def finished(line: dict[str, dict[str, object]]) -> int:
    """Episodes that ended up to this update: trained on or dropped."""
    books = line["ledger"]
    dropped = books["dropped"]
    assert isinstance(dropped, dict)
    return int(str(books["trained"])) + sum(dropped.values())


if __name__ == "__main__":
    main()
