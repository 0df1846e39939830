"""A policy is trained by an agent that this project did not write: the bare `openai` client, as the example has it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import openai
import pytest

from ale.config import load
from ale.pipeline import train

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not Path(f"/usr/bin/python3.{sys.version_info.minor}").exists(),
    reason="the sandbox's own Python is of another version than the packages",
)
def test_ipa_updates_are_completed_with_the_bare_openai_client(tmp_path: Path) -> None:
    packages = Path(openai.__file__).parent.parent
    config = load(
        ROOT / "examples" / "openai_client" / "train.toml",
        [
            f'runs_dir="{tmp_path}"',
            f'agent.mounts={{"{ROOT}/examples/openai_client" = "/agent", "{packages}" = "/packages"}}',
            "tasks.heldout=16",
            "tasks.families=4",
            "learner.updates=2",
        ],
    )
    summary = asyncio.run(train(config))
    assert summary.updates == 2
    assert summary.lost_samples == 0
    assert (summary.heldout_before.n, summary.heldout_after.n) == (16, 16)
    lines = [json.loads(line) for line in (tmp_path / config.name / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "update" in line]
    assert len(updates) == 2
    assert all(line["grad_norm"] > 0 for line in updates)
