"""A policy is trained by agents that this project did not write, as the examples have them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ale.config_file import load
from ale.pipeline import train

from .packages import copy_packages

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = Path(f"/usr/bin/python3.{sys.version_info.minor}")

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON.exists(), reason="the sandbox's own Python is of another version than the packages"),
]


def packages(example: str, folder: Path) -> Path:
    """Where the packages of an example are: here already, or installed by its own script."""
    if example == "openai_client":
        return copy_packages("openai", folder)
    if (there := ROOT / "runs" / "packages" / example).is_dir():
        return there
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / example / "install.sh"), str(folder)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if done.returncode:
        pytest.skip(f"the packages of examples/{example} cannot be installed: {done.stderr[-500:]}")
    return folder


@pytest.mark.parametrize("example", ["openai_client", "openai_agents", "mini_swe_agent"])
def test_ipa_updates_are_completed_by_an_agent_as_it_is(example: str, tmp_path: Path) -> None:
    needed = packages(example, tmp_path / "packages")
    config = load(
        ROOT / "examples" / example / "train.toml",
        [
            f'runs_dir="{tmp_path}"',
            f'agent.mounts={{"{ROOT}/examples/{example}" = "/agent", "{needed}" = "/packages"}}',
            "tasks.heldout=8",
            "learner.updates=2",
        ],
    )
    summary = asyncio.run(train(config))
    assert summary.updates == 2
    assert summary.lost_samples == 0
    assert summary.max_lag_seen <= config.rollout.max_lag
    assert summary.heldout_before is not None
    assert summary.heldout_after is not None
    assert (summary.heldout_before.n, summary.heldout_after.n) == (8, 8)
    lines = [json.loads(line) for line in (tmp_path / config.name / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "update" in line]
    assert len(updates) == 2
    assert all(line["grad_norm"] > 0 for line in updates)
    assert all(0 < line["batch_reward"] < 1 for line in updates)  # its groups are mixed, or it would not be trained on
