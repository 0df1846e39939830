"""Does the nano agent learn, and is it IPA that teaches it? Held-out success of `examples/nano.toml`, and its controls.

    python -m bench.nano                 everything, about 45 minutes on two cores
    python -m bench.nano seed1 lr0       only these; the other rows of the result file stay

Rows `seedN` are the run itself. Each control is seed 0 with one thing taken away: `lr0` never changes a weight (20
updates, as more could not differ), `shuffled` gives each rollout the reward of another (60 updates, for a policy that
stays poor makes them slow), and `sft` goes on imitating the same demonstrations instead of optimising the policy, with
an evaluation every 150 steps, and counts with its best one. The value is held-out success after, the baseline the
success before IPA in the same run (of `sft`: after 150 steps), `spread` the 95% interval of the value.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from ale.config_file import load
from ale.pipeline import train
from ale.progress import Rate, Summary
from bench.harness import RESULTS, ROOT, Benchmark, Row, held_out

_NANO = ROOT / "examples" / "nano.toml"
_SFT_STEPS, _SFT_EVERY = 1_800, 150


def main() -> None:
    jobs: dict[str, Callable[[Path], tuple[Rate, Rate]]] = {
        "seed0": lambda folder: before_and_after(folder, "seed=0"),
        "seed1": lambda folder: before_and_after(folder, "seed=1"),
        "seed2": lambda folder: before_and_after(folder, "seed=2"),
        "lr0": lambda folder: before_and_after(folder, "learner.learning_rate=0", "learner.updates=20"),
        "shuffled": lambda folder: before_and_after(folder, "algorithm.shuffle_rewards=true", "learner.updates=60"),
        "sft": imitated,
    }
    chosen = sys.argv[1:] or list(jobs)
    for name in chosen:
        if name not in jobs:
            sys.exit(f"bench nano: there is no job {name!r}; there are: {', '.join(jobs)}")
    bench = Benchmark("nano")
    path = RESULTS / "nano.json"
    rows = {row.name: row for row in msgspec.json.decode(path.read_bytes(), type=list[Row])} if path.exists() else {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            before, after = jobs[name](Path(folder))
        rows[name] = held_out(name, before, after)
        bench.rows = [rows[job] for job in jobs if job in rows]
        bench.write()  # each job takes minutes: what is done is kept
    bench.finish()


def before_and_after(folder: Path, *overrides: str) -> tuple[Rate, Rate]:
    summary = run(folder, *overrides)
    print(f"{' '.join(overrides)}: {msgspec.json.encode(summary).decode()}", flush=True)
    return summary.heldout_before, summary.heldout_after


def imitated(folder: Path) -> tuple[Rate, Rate]:
    """The first and the best evaluation of imitation that does not stop."""
    steps = (f"warm_start.steps={_SFT_STEPS}", f"warm_start.eval_every={_SFT_EVERY}", "warm_start.stop_at=0")
    run(folder, *steps, "learner.updates=0", "name=sft")
    curve = {}
    for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        label, _, step = str(values.get("evaluation", "")).rpartition("_")
        if label == "warm_start":
            curve[int(step)] = Rate(success=values["success"], ci95=tuple(values["ci95"]), n=values["n"])
    print("sft:", {step: rate.success for step, rate in curve.items()}, flush=True)
    return curve[_SFT_EVERY], max(curve.values(), key=lambda rate: rate.success)


def run(folder: Path, *overrides: str) -> Summary:
    config = load(_NANO, [f"runs_dir={folder}", "tasks.families=0", *overrides])
    return asyncio.run(train(config))


if __name__ == "__main__":
    main()
