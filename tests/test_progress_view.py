import io
import os
import re
import subprocess
import sys
from collections import deque

import pytest
from rich.console import Console

from ale import progress_view
from ale.mailbox import Wait
from ale.progress import Phase, Progress
from ale.progress_view import ProgressView, sparkline

VALUES = {"success": 0.62, "batch_reward": 0.25, "lag": 1.0, "grad_norm": 0.1, "truth_max": 1e-6, "episodes": 40.0}


class Clock:
    """Stands for `time.monotonic`: `clock.now` is set by the test."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_view, "time", clock)
    return clock


def view(*, terminal: bool, width: int = 100) -> tuple[ProgressView, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False, color_system=None)
    return ProgressView(console), out


def train(step: int, total: int = 10, waits: tuple[str, ...] = (), **values: float) -> Progress:
    return Progress(phase="train", step=step, total=total, values=VALUES | values, waits=waits)


def test_a_log_gets_a_line_at_the_start_and_the_end_of_each_phase(clock: Clock) -> None:
    shown, out = view(terminal=False)
    phases: tuple[Phase, ...] = ("warm_start", "evaluate")
    with shown:
        for phase in phases:
            for n in (1, 2, 3):
                shown(Progress(phase=phase, step=n, total=3, values={"loss": 1 / n}))
    assert [line.strip() for line in out.getvalue().splitlines()] == [
        "0:00  warm start 1/3  loss 1",
        "0:00  warm start 3/3  loss 0.333",
        "0:00  evaluate 1/3",
        "0:00  evaluate 3/3",
    ]


def test_a_line_of_training_says_what_matters_and_no_more(clock: Clock) -> None:
    shown, out = view(terminal=False)
    with shown:
        shown(train(1))
        clock.now += 20
        shown(train(3, episodes=100.0))
    assert [line.strip() for line in out.getvalue().splitlines()] == [
        "0:00  train 1/10  success 62%  reward 0.25  lag 1",
        "0:20  train 3/10  success 62%  reward 0.25  lag 1  3 episodes/s  1:10 left",
    ]


def test_a_log_is_not_flooded_by_what_is_told_in_between(clock: Clock) -> None:
    shown, out = view(terminal=False)
    with shown:
        for _ in range(25):
            shown(train(1))
            clock.now += 1
    assert len(out.getvalue().splitlines()) == 3


def test_what_is_told_again_after_the_end_of_a_phase_is_not_a_new_one(clock: Clock) -> None:
    shown, out = view(terminal=False)
    with shown:
        for progress in (train(1), train(10), train(10), train(10)):
            shown(progress)
        shown(Progress(phase="evaluate", step=1, total=5))
    assert [line.split()[1:3] for line in out.getvalue().splitlines()] == [
        ["train", "1/10"],
        ["train", "10/10"],
        ["evaluate", "1/5"],
    ]


def test_the_second_of_two_evaluations_has_lines_of_its_own(clock: Clock) -> None:
    shown, out = view(terminal=False)
    with shown:
        for total in (3, 5):
            for step in range(1, total + 1):
                shown(Progress(phase="evaluate", step=step, total=total))
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["1/3", "3/3", "1/5", "5/5"]


def test_a_terminal_shows_what_is_waited_for_and_the_rise_of_success(clock: Clock) -> None:
    shown, out = view(terminal=True)
    with shown:
        shown(train(1, success=0.0))
        shown(train(2, success=1.0, waits=("trainer: 8 groups (2 s)",)))
        assert shown._live is not None
        shown._live.refresh()
        seen = out.getvalue()
        assert "trainer: 8 groups (2 s)" in seen
        assert "success ▁█" in seen
        assert "━━━━────" in seen


def test_a_terminal_keeps_the_last_line_of_a_phase(clock: Clock) -> None:
    shown, out = view(terminal=True)
    with shown:
        for n in (1, 2):
            shown(Progress(phase="evaluate", step=n, total=2, waits=("trainer: a batch",)))
    kept = [line for line in out.getvalue().splitlines() if "evaluate 2/2" in line]
    assert kept
    assert "trainer: a batch" not in out.getvalue().split("evaluate 2/2")[-1]


def test_a_narrow_terminal_is_not_overrun(clock: Clock) -> None:
    shown, out = view(terminal=True, width=30)
    with shown:
        shown(train(1, waits=("trainer: 8 groups to train version 12 on (2 s)",)))
        assert shown._live is not None
        shown._live.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert max(map(len, re.split(r"[\n\r]", text))) <= 30


@pytest.mark.parametrize(("values", "line"), [([0.0, 0.5, 1.0], "▁▅█"), ([-1.0, 2.0], "▁█"), ([], "")])
def test_a_sparkline_is_cut_to_shares(values: list[float], line: str) -> None:
    assert sparkline(deque(values)) == line


def test_those_who_wait_for_the_same_are_one_line() -> None:
    from ale.run import in_a_few_words

    waits = [
        Wait("trainer", "8 groups", 12.4, None),
        Wait("buffer", "a message in the inbox of 'buffer'", 11.0, None),
        Wait("Task-1", "the answer of 'envs' to Rollout", 9.0, 60.0),
        Wait("Task-2", "the answer of 'envs' to Rollout", 8.0, 60.0),
    ]
    assert in_a_few_words(waits) == ("trainer: 8 groups (12 s)", "2 tasks: the answer of 'envs' to Rollout (9 s)")
    assert len(in_a_few_words([Wait("t", str(n), 1.0, None) for n in range(20)])) == 6


def test_a_run_goes_on_when_nobody_reads_its_progress() -> None:
    code = """if True:
        import sys
        from ale.progress import Progress
        from ale.progress_view import ProgressView
        sys.stdin.readline()
        with ProgressView() as view:
            for step in range(1, 200):
                view(Progress(phase="train", step=1, total=1))
                view(Progress(phase="evaluate", step=1, total=1))
        print("the end", file=sys.stderr)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    run.stdin.write(b"go\n")
    run.stdin.close()
    assert run.stderr.read() == b"the end\n"
    assert run.wait(60) == 0
    run.stderr.close()
