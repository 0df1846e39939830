"""Runs of older versions of ale: small folders kept as they were left, killed in their middle.

`tests/data/format0` was made by the last version whose journal did not say its format: a model of one layer, killed
after its fourth update with rollouts under way, without its last checkpoint. To add one when `FORMAT` is raised: run
`format0/small.toml` with the version before, kill it, and keep the model and `runs/NAME/` as `run/`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ale.config_file import load
from ale.data.books import LedgerStatistics
from ale.data.events import Began, RolloutKept, Updated
from ale.data.journal import FORMAT, Journal, read_journal
from ale.data.run_folder import RunFolder
from ale.data.run_log import RunLog
from ale.errors import RunFolderError

HERE = Path(__file__).parent
FORMATS = sorted(path.name for path in HERE.glob("format*"))


@pytest.fixture(params=FORMATS)
def run(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the directory in which it was made."""
    shutil.copytree(HERE / request.param / "model", tmp_path / "model")
    shutil.copytree(HERE / request.param / "run", tmp_path / "runs" / request.param)
    monkeypatch.chdir(tmp_path)
    return Path("runs") / str(request.param)


def test_there_is_a_folder_of_every_format_but_that_of_today() -> None:
    assert [f"format{number}" for number in range(FORMAT)] == FORMATS


def test_an_old_run_can_be_looked_at(run: Path) -> None:
    log = RunLog.open(run)
    assert [line["update"] for line in log.updates] == [1, 2, 3, 4]
    assert len(list(log.logged())) == 16
    assert log.summary is None


def test_an_old_run_is_opened_to_be_resumed_with_its_books(run: Path) -> None:
    before = list(read_journal(run / "journal"))
    assert not any(isinstance(event, Began) for event in before)
    with RunFolder(load(run), resume=True) as folder:
        books = folder.books
        assert (books.updates, books.recorded, books.lives) == (4, 4, 2)
        assert [trained.event.number for trained in books.since] == [3, 4]
        kept = {event.trajectory.id for event in before if isinstance(event, RolloutKept)}
        trained = {group for event in before if isinstance(event, Updated) for group in event.groups}
        waiting = {t.id for group in books.groups.values() for t in group.members}
        assert {id_ for id_ in kept if id_.split("/")[0] not in trained} == waiting
        assert books.restarted == sum(len(group.running) for group in books.groups.values()) > 0
        assert LedgerStatistics.of(books).lost == 0


@pytest.mark.full
def test_an_old_run_goes_on_to_its_end(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from ale.cli import main; main()", "train", str(run), "--resume"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["updates"], summary["lost_samples"], summary["lives"]) == (5, 0, 2)
    assert summary["restarted"] > 0


def test_a_journal_of_a_newer_version_is_refused_by_its_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write(Began(format=FORMAT + 1, ale="99.0"))
    journal.close()
    with pytest.raises(RunFolderError, match=f"format {FORMAT + 1}, which a newer version .* up to {FORMAT}"):
        Journal(tmp_path / "journal")
    with pytest.raises(RunFolderError, match=f"format {FORMAT + 1}, which a newer version"):
        list(read_journal(tmp_path / "journal"))  # a replay, a simulation
