"""A dozen of `just chaos`: random processes of short runs, killed at random moments; the runs resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.chaos import chaos, report


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_dozen_runs_that_are_killed_and_resumed_lose_repeat_and_leave_nothing(tmp_path: Path) -> None:
    outcomes = chaos(tmp_path / "chaos", 12, 7, minutes=45, say=False)
    assert len(outcomes) == 14
    assert [said for outcome in outcomes for said in outcome.wrong] == [], report(outcomes)
