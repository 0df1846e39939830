"""What the warm start decides by itself: which tasks are demonstrated, and when it looks whether it has done enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ale.errors import ConfigError
from ale.progress import Rate
from ale.task import Task

# How often, and on how many training tasks, the warm start looks whether `stop_at` is reached: less often while it is
# not even halfway there, for a look costs as much as several steps.
_EVERY = 10
_EVERY_FAR = 40
CHECK_TASKS = 64
_NAME = "warm_start_check_"
# Tasks looked at for each demonstration wanted, before the stream is said to lack them.
_LOOK_AT_MOST = 50


class Checks:
    """When to look, and whether `stop_at` is reached; never when that is 0. `seen`: the success of earlier
    looks, by step."""

    def __init__(self, stop_at: float, seen: Mapping[int, float]) -> None:
        self._stop_at = stop_at
        self._seen = dict(seen)

    @staticmethod
    def name(step: int) -> str:
        """That of the evaluation."""
        return f"{_NAME}{step}"

    @classmethod
    def of(cls, stop_at: float, rates: Mapping[str, Rate]) -> Checks:
        """Those of a run whose evaluations so far are `rates`, by `NAME@UPDATE`."""
        seen = {key.partition("@")[0]: rate for key, rate in rates.items() if key.startswith(_NAME)}
        return cls(stop_at, {int(name.removeprefix(_NAME)): rate.success for name, rate in seen.items()})

    def due(self, step: int) -> bool:
        """A resumed run passes the steps of its earlier looks again, and gets the same answers."""
        if not self._stop_at:
            return False
        last = max((before for before in self._seen if before < step), default=0)
        near = self._seen.get(last, 0.0) >= self._stop_at / 2
        return step - last >= (_EVERY if near else _EVERY_FAR)

    def reached(self, step: int, success: float) -> bool:
        self._seen[step] = success
        return success >= self._stop_at


def choose_demonstrated(tasks: Iterator[Task], total: int, by_family: dict[str, int]) -> list[Task]:
    """Tasks to demonstrate, taken off the front of the training stream: `by_family` of each family it names; without
    it, the first `total` that have a solution. Raises `ConfigError` when the stream does not offer them."""
    chosen: list[Task] = []
    left = dict(by_family)
    for looked, task in enumerate(tasks):
        if looked > _LOOK_AT_MOST * max(total, sum(by_family.values())):
            break
        if not task.solution or (by_family and left.get(task.family, 0) < 1):
            continue
        chosen.append(task)
        if by_family:
            left[task.family] -= 1
            if not any(left.values()):
                return chosen
        elif len(chosen) == total:
            return chosen
    missing = ", ".join(f"{n} of {family}" for family, n in left.items() if n) or f"{total - len(chosen)}"
    raise ConfigError(f"warm_start: the tasks offer too few solutions to demonstrate; missing: {missing}.")
