"""`ale train` interrupted, killed and resumed, for real: sandboxes, engine process, learner process, files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ale.cli import app
from ale.data.events import Event, GroupDropped, GroupOpened, Recorded, RolloutDropped, RolloutKept, RolloutStarted
from ale.data.events import Updated as Trained
from ale.data.journal import Journal
from ale.testing.processes import ended, processes_with
from ale.testing.small_run import DEADLINE_S, SmallRun


class Folder(SmallRun):
    """That, and what its journal says."""

    def __init__(self, place: Path, model: Path, updates: int) -> None:
        super().__init__(place, model, {"learner.updates": updates})

    def events(self) -> list[Event]:
        journal = Journal(self.path / "journal")
        try:
            return list(journal.read())
        finally:
            journal.close()

    def wait_for(self, process: subprocess.Popen[str], kind: type, count: int) -> None:
        """Until the journal holds so many events of this kind."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and process.poll() is None:
            data = (self.path / "journal").read_bytes() if (self.path / "journal").exists() else b""
            if data.count(kind.__name__.encode()) >= count:
                return
            time.sleep(0.02)
        raise AssertionError(
            f"no {count} {kind.__name__}; the run ended with {process.poll()}: {process.communicate()}"
        )


def check(folder: Folder, updates: int) -> None:
    """Nothing that had finished was lost or trained on twice, no task was left out or repeated, the books add up."""
    events = folder.events()
    started = [e.rollout for e in events if isinstance(e, RolloutStarted)]
    kept = [e.trajectory.id for e in events if isinstance(e, RolloutKept)]
    dropped = [e.rollout for e in events if isinstance(e, RolloutDropped)]
    for ids in (started, kept, dropped, [*kept, *dropped]):
        assert max(Counter(ids).values(), default=1) == 1
    assert set(kept) | set(dropped) <= set(started)
    opened = [e for e in events if isinstance(e, GroupOpened)]
    assert [e.drawn for e in opened] == list(range(opened[0].drawn, opened[0].drawn + len(opened)))
    assert max(Counter(e.task for e in opened).values()) == 1
    trained = [group for e in events if isinstance(e, Trained) for group in e.groups]
    gone = [e.group for e in events if isinstance(e, GroupDropped)]
    assert max(Counter([*trained, *gone]).values()) == 1
    assert [e.number for e in events if isinstance(e, Trained)] == list(range(1, updates + 1))
    assert [e.update for e in events if isinstance(e, Recorded)] == list(range(1, updates + 1))

    written = folder.lines()
    assert [line["update"] for line in written] == list(range(1, updates + 1))
    for line in written:
        books = line["ledger"]
        assert books["started"] == books["trained"] + books["buffered"] + books["running"] + sum(
            books["dropped"].values()
        )
    members = [line["id"] for line in folder.lines("trajectories.jsonl")]
    assert sorted(members) == sorted(id_ for id_ in kept if id_.split("/")[0] in set(trained))
    said = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    names = [line["evaluation"] for line in said if "evaluation" in line]
    assert names == ["heldout_before", "heldout_after"]
    summary = json.loads((folder.path / "summary.json").read_text())
    assert (summary["updates"], summary["lost_samples"], summary["episodes"]) == (updates, 0, len(started))
    assert (folder.path / "checkpoints" / "final" / "model.safetensors").is_file()


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(tmp_path: Path, nano_path: Path) -> None:
    folder = Folder(tmp_path, nano_path, updates=3)
    process = folder.start("train", "small.toml")
    folder.wait_for(process, Recorded, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "Once more, and it ends at once" in err
    assert "Go on with: ale train runs/a --resume" in err
    kept = {e.trajectory.id for e in folder.events() if isinstance(e, RolloutKept)}
    folder.ale("train", "runs/a", "--resume")
    check(folder, 3)
    assert kept <= {e.trajectory.id for e in folder.events() if isinstance(e, RolloutKept)}

    before = (folder.path / "summary.json").read_bytes()
    done = CliRunner().invoke(app, ["train", str(folder.path), "--resume"])
    assert done.exit_code == 0, done.output
    assert "had ended before; nothing was left to do" in done.output
    assert (folder.path / "summary.json").read_bytes() == before


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path, nano_path: Path) -> None:
    folder, rng, updates = Folder(tmp_path, nano_path, updates=20), random.Random(0), 20
    kills, args = 0, ["train", "small.toml"]
    while kills < 20:
        process = folder.start(*args)
        # A life that is killed before it has written anything tells little: most are given time to get somewhere.
        before = (folder.path / "journal").stat().st_size if (folder.path / "journal").exists() else 0
        grown, deadline = before + rng.randrange(0, 6000), time.monotonic() + DEADLINE_S
        while process.poll() is None and time.monotonic() < deadline:
            if (folder.path / "journal").exists() and (folder.path / "journal").stat().st_size > grown:
                break
            time.sleep(rng.random() * 0.05)
        assert process.poll() is None, process.communicate()
        descriptors = [os.pidfd_open(pid) for pid in processes_with(folder.mark)]
        process.kill()
        process.communicate(timeout=DEADLINE_S)
        assert ended(descriptors) == len(descriptors)
        kills += 1
        args = ["train", "runs/a", "--resume"]
    folder.ale("train", "runs/a", "--resume")
    check(folder, updates)
    assert not processes_with(folder.mark)


@pytest.mark.full
def test_ctrl_c_twice_ends_at_once_and_the_run_can_be_resumed(tmp_path: Path, nano_path: Path) -> None:
    folder = Folder(tmp_path, nano_path, updates=2)
    process = folder.start("train", "small.toml")
    folder.wait_for(process, RolloutKept, 1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "Once more" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ended at once" in err or "Go on with" in err
    assert time.monotonic() - began < 30
    folder.ale("train", "runs/a", "--resume")
    check(folder, 2)


@pytest.mark.full
def test_a_full_disk_ends_the_run_in_one_paragraph_and_nothing_is_lost(tmp_path: Path, nano_path: Path) -> None:
    folder = Folder(tmp_path, nano_path, updates=6)
    (tmp_path / "runs").mkdir()
    # A mount namespace of its own, in which runs/ is a disk of two megabytes; what is on it is copied out at the end.
    script = (
        'mount -t tmpfs -o size=2m tmpfs runs && { "$@"; code=$?; mkdir -p kept && cp -a runs/. kept; exit $code; }'
    )
    process = folder.start("train", "small.toml", wrap=("unshare", "-m", "sh", "-c", script, "sh"))
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2, err
    assert "cannot be written" in err
    assert "--resume" in err
    assert "Traceback" not in err
    (tmp_path / "runs").rmdir()
    (tmp_path / "kept").rename(tmp_path / "runs")
    folder.ale("train", "runs/a", "--resume")
    check(folder, 6)
