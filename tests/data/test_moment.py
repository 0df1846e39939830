"""`ale why` of runs that live, were killed, or whose controller is stuck."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ale.commands.why import state
from ale.data.cause import find, report
from ale.data.moment import Moment, read, write
from ale.errors import RunFolderError
from ale.mailbox import Wait
from ale.vitals import ProcessState, Vitals

ALIVE = Vitals(condition="running")


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[None]:
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


def moment(age_s: float = 0.0, ended: str = "") -> Moment:
    return Moment(at=time.time() - age_s, pid=os.getpid(), vitals=ALIVE, ended=ended)


def test_a_live_run_is_told_from_one_whose_controller_is_stuck(tmp_path: Path, lock: None) -> None:
    assert state(tmp_path, moment()).startswith("live, as of 0.")
    assert "has written no moment for 60 s: all of it is stuck" in state(tmp_path, moment(60))
    assert state(tmp_path, moment(60, "Stalled: x")) == "is ending, since 60 s: Stalled: x"


def test_a_killed_run_is_told_from_one_that_ended(tmp_path: Path) -> None:
    assert "was killed, at most a second after this moment" in state(tmp_path, moment(3))
    assert state(tmp_path, moment(3, "done")) == "ended 3.0 s ago: done"


def test_a_folder_without_a_moment_says_why_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="did not write it, or it ended before its first second"):
        read(tmp_path)
    (tmp_path / "moment.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read(tmp_path)


def test_the_chain_is_followed_to_the_sickest_process_and_a_circle_is_no_cause(tmp_path: Path) -> None:
    stopped = ProcessState(name="engine", pid=7, vitals=Vitals(condition="stopped"), beat_s=30.0, asked=1)
    waits = (
        Wait("trainer/run", "a batch", 50.0, 3600.0, on="actor buffer", of="trainer"),
        Wait("buffer/0", "8 groups", 50.0, None, on="actor generator", of="buffer"),
        Wait("generator/run", "a free slot", 90.0, None, on="actor trainer", of="generator"),
        Wait("rollout g1/0", "the answer of actor 'envs'", 40.0, 500.0, on="task envs/0", of="generator"),
        Wait("rollout g1/1", "the answer of actor 'envs'", 60.0, 500.0, on="task envs/1", of="generator"),
        Wait("envs/0", "the answer of process engine to Generate", 31.0, 120.0, on="process engine", of="envs"),
        Wait("envs/1", "the end of a command", 60.0, 100.0, of="envs", release="its end"),
        Wait("envs/2", "a message", 70.0, None, of="envs", idle=True),
    )
    seen = Moment(at=1.0, pid=1, vitals=ALIVE, waits=waits, processes=(stopped,), failures={"episode_timeout": 3})
    write(tmp_path, seen)
    assert read(tmp_path) == seen
    cause = find(seen)
    assert cause is not None
    assert cause.said.startswith("process engine (pid 7) is stopped")
    assert "kill -CONT 7" in cause.said
    assert cause.release == "an answer of process engine, or its deadline, in 89 s"
    assert [link.who for link in cause.chain] == ["trainer/run", "buffer/0", "rollout g1/0", "envs/0"]
    assert cause.others == ("1 x the end of a command",)
    assert "since     3 x episode_timeout" in report(seen)
