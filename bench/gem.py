"""Does the loop learn a game that is not ours? Held-out success of `examples/gem.toml`, and where its seconds go.

    python -m bench.gem [SECTION.FIELD=VALUE ...]

Checked first: at least ten updates, each with a group of mixed rewards and a gradient. Row `success`: held-out success
after IPA, the baseline the success before it in the same run, `spread` its 95% interval. Rows `wait`, `step`, `sync`:
seconds of an update by phase, the median: waiting for a batch, the learner, new weights becoming live.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile

from ale.actors.trainer import Update
from ale.config_file import load
from ale.pipeline import train
from bench.harness import ROOT, Benchmark, Mismatch, Row, commit, held_out, machine

_LEAST_UPDATES = 10


def main() -> None:
    updates: list[Update] = []

    async def watch(update: Update) -> None:
        rewards = [[t.reward for t in group.trajectories] for group in update.batch.groups]
        if not any(len(set(of_group)) > 1 for of_group in rewards):
            raise Mismatch(f"update {update.number} has no group of mixed rewards: {rewards}")
        if not update.metrics.grad_norm > 0:
            raise Mismatch(f"update {update.number} has the gradient norm {update.metrics.grad_norm}")
        updates.append(update)

    with tempfile.TemporaryDirectory() as folder:
        config = load(ROOT / "examples" / "gem.toml", [f"runs_dir={folder}", *sys.argv[1:]])
        summary = asyncio.run(train(config, watch=watch))
    before, after = summary.heldout_before, summary.heldout_after
    if len(updates) < _LEAST_UPDATES or before is None or after is None:
        raise Mismatch(f"{len(updates)} updates, at least {_LEAST_UPDATES} and held-out tasks are needed")
    print(
        f"before: {before.success:.3f} {before.ci95}, after: {after.success:.3f} {after.ci95}; {summary.wall_s:.0f} s"
    )
    bench = Benchmark("gem")
    bench.rows = [
        held_out("success", before, after),
        *(_phase(name, [getattr(update, f"{name}_s") for update in updates]) for name in ("wait", "step", "sync")),
    ]
    bench.finish()


def _phase(name: str, seconds: list[float]) -> Row:
    return Row(
        name=name,
        value=statistics.median(seconds),
        unit="s per update",
        baseline=None,
        baseline_value=None,
        ratio=None,
        spread=(min(seconds), max(seconds)),
        commit=commit(),
        machine=machine(),
    )


if __name__ == "__main__":
    main()
