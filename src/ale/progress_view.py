"""How a run looks while it goes on: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ale.progress import Progress, Rate

# A log that no terminal redraws gets a line this often, and one at each end of a phase.
PLAIN_INTERVAL_S = 10.0
_NAMES = {"warm_start": "warm start", "evaluate": "evaluate", "train": "train", "resume": "resume"}


class ProgressView:
    """Call it with each `Progress`, inside `with`. A finished phase leaves its last line behind."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._began = time.monotonic()
        self._shown: Progress | None = None
        self._printed_at = -PLAIN_INTERVAL_S

    def __enter__(self) -> ProgressView:
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_phase()

    def __call__(self, progress: Progress) -> None:
        if self._shown is not None and (
            progress.phase != self._shown.phase or progress.step < self._shown.step or self._done(self._shown)
        ):
            self._end_phase()
        self._shown = progress
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(self._line(progress))
        elif self._done(progress) or time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._print(progress)

    def _end_phase(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._printed_at = -PLAIN_INTERVAL_S
        self._shown = None

    def _print(self, progress: Progress) -> None:
        self._console.print(self._line(progress), soft_wrap=True)
        self._printed_at = time.monotonic()

    @staticmethod
    def _done(progress: Progress) -> bool:
        return progress.step >= progress.total > 0

    def _line(self, progress: Progress) -> Text:
        elapsed = int(time.monotonic() - self._began)
        head = f"{elapsed // 60:3d}:{elapsed % 60:02d}  {_NAMES[progress.phase]:<10} {progress.step}/{progress.total}"
        values = "  ".join(f"{name} {value:.4g}" for name, value in progress.values.items())
        waits = f"  waiting for {', '.join(progress.waits)}" if progress.waits and self._console.is_terminal else ""
        line = Text(f"{head}  {values}{waits}".rstrip(), overflow="ellipsis", no_wrap=self._console.is_terminal)
        line.stylize("bold", 8, len(head))
        return line


def describe(rate: Rate | None) -> str:
    """`74.0% (95% 67.5 to 79.6, 200 tasks)`, the same words wherever a rate is printed."""
    if rate is None:
        return "no such tasks"
    low, high = rate.ci95
    return f"{rate.success:.1%} (95% interval {low:.1%} to {high:.1%}, {rate.n} tasks)"
