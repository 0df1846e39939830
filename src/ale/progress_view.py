"""How a run looks while it goes on: a live view in a terminal, a short line now and then elsewhere.

3:07  train 12/140 ━━━━╸━━━━━━━━━━━  success 61%  reward 0.74  lag 1  31.2 episodes/s  5:40 left
      success ▂▃▃▄▅▆▆▇
      trainer: 8 groups to train version 12 on (2 s)
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ale.progress import Phase, Progress, Rate

# A log that no terminal redraws gets a line this often, and one at each end of a phase.
PLAIN_INTERVAL_S = 10.0
_NAMES: dict[Phase, str] = {"warm_start": "warm start", "evaluate": "evaluate", "train": "train", "resume": "resume"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_HISTORY = 60
_BAR = 20
# Speeds and the time left are those of the last so many steps.
_WINDOW = 20


class _Console(Console):
    """Whoever reads the lines may go; the run goes on, and says no more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def quiet_console() -> Console:
    """For stdout: colours only where they are seen (a terminal, no NO_COLOR), no error where nobody reads."""
    return _Console(highlight=False)


class ProgressView:
    """Call it with each `Progress`, inside `with`. A finished phase leaves its last line behind."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or quiet_console()
        self._live: Live | None = None
        self._began = time.monotonic()
        self._shown: Progress | None = None
        self._printed_at = -PLAIN_INTERVAL_S
        self._steps: deque[tuple[float, Progress]] = deque(maxlen=_WINDOW)
        self._success: deque[float] = deque(maxlen=_HISTORY)

    def __enter__(self) -> ProgressView:
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_phase()

    def __call__(self, progress: Progress) -> None:
        shown = self._shown
        if shown is not None and (
            (progress.phase, progress.total) != (shown.phase, shown.total) or progress.step < shown.step
        ):
            self._end_phase()
            shown = None
        if shown is not None and _done(shown):
            if progress.step == shown.step:  # told again before the next phase
                return
            self._end_phase()
        if shown is None or progress.step > shown.step:
            self._steps.append((time.monotonic(), progress))
            if progress.phase == "train" and "success" in progress.values:
                self._success.append(progress.values["success"])
        self._shown = progress
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(self._view(progress))
        elif _done(progress) or time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._console.print(self._line(progress), soft_wrap=True)
            self._printed_at = time.monotonic()

    def _end_phase(self) -> None:
        if self._live is not None:
            if self._shown is not None:
                self._live.update(self._line(self._shown))  # what it waited for is of no interest any more
            self._live.stop()
            self._live = None
        self._printed_at = -PLAIN_INTERVAL_S
        self._shown = None
        self._steps.clear()

    def _view(self, progress: Progress) -> Group:
        lines = [self._line(progress)]
        if len(self._success) > 1:
            lines.append(_cut(f"        success {sparkline(self._success)}", "cyan"))
        lines += [_cut(f"        {wait}", "dim") for wait in progress.waits]
        return Group(*lines)

    def _line(self, progress: Progress) -> Text:
        head = f"{_clock(time.monotonic() - self._began):>7}  {_NAMES[progress.phase]} {progress.step}/{progress.total}"
        bar = ""
        if self._console.is_terminal and progress.total:
            full = round(_BAR * progress.step / progress.total)
            bar = f" {'━' * full}{'─' * (_BAR - full)}"
        text = "  ".join([head + bar, *self._facts(progress)])
        line = _cut(text) if self._console.is_terminal else Text(text)
        line.stylize("bold", 9, len(head))
        return line

    def _facts(self, progress: Progress) -> list[str]:
        v, facts = progress.values, []
        for name, label, form in (
            ("demonstrations", "demonstrations", ".0f"),
            ("success", "success", ".0%"),
            ("batch_reward", "reward", ".3g"),
            ("lag", "lag", ".0f"),
        ):
            if name in v:
                facts.append(f"{label} {v[name]:{form}}")
        if progress.phase == "warm_start" and "loss" in v:
            facts.append(f"loss {v['loss']:.3g}")
        since, first = self._steps[0] if self._steps else (time.monotonic(), progress)
        took = time.monotonic() - since
        if took <= 0 or progress.step <= first.step:
            return facts
        episodes = v.get("episodes", 0.0) - first.values.get("episodes", 0.0)
        if progress.phase == "evaluate":
            episodes = progress.step - first.step
        if episodes > 0:
            facts.append(f"{episodes / took:.3g} episodes/s")
        if not _done(progress):
            facts.append(f"{_clock((progress.total - progress.step) * took / (progress.step - first.step))} left")
        return facts


def sparkline(values: deque[float]) -> str:
    """Shares from 0 to 1 as blocks: `▁▄█`."""
    return "".join(_BLOCKS[round(min(1.0, max(0.0, value)) * (len(_BLOCKS) - 1))] for value in values)


def describe(rate: Rate | None) -> str:
    """`74.0% (95% interval 67.5% to 79.6%, 200 tasks)`, the same words wherever a rate is printed."""
    if rate is None:
        return "no such tasks"
    low, high = rate.ci95
    return f"{rate.success:.1%} (95% interval {low:.1%} to {high:.1%}, {rate.n} tasks)"


def _done(progress: Progress) -> bool:
    return progress.step >= progress.total > 0


def _clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cut(line: str, style: str = "") -> Text:
    return Text(line, style=style, no_wrap=True, overflow="ellipsis")
