"""The stream of training tasks with a cursor, so that a resumed run draws the next one: none twice, none left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ale.errors import ConfigError
from ale.task import Task


class TaskStream:
    """`tasks`, counted: `drawn` of them have been taken. They have to come in the same order in every life of a run.
    `note` hears of each, with its number."""

    def __init__(self, tasks: Iterator[Task], note: Callable[[Task, int], None] | None = None) -> None:
        self._tasks = tasks
        self._note = note
        self.drawn = 0

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        task = next(self._tasks)
        self.drawn += 1
        if self._note is not None:
            self._note(task, self.drawn)
        return task

    def go_to(self, drawn: int, wanted: Mapping[int, str]) -> dict[int, Task]:
        """Draws until `drawn` have been taken and returns those at the places in `wanted`: place -> task id.

        Raises `ConfigError` when another task stands there: the tasks are not those that the run began with.
        """
        found: dict[int, Task] = {}
        while self.drawn < drawn:
            task = next(self, None)
            if task is None:
                raise ConfigError(
                    f"tasks.source: the run had taken {drawn} tasks from it, but there are {self.drawn} now. "
                    "Put back the tasks that it began with, or start it anew with --overwrite."
                )
            if wanted.get(self.drawn, task.id) != task.id:
                raise ConfigError(
                    f"tasks.source: the run was rolling out {wanted[self.drawn]} as task number {self.drawn}, which is "
                    f"{task.id} now. Put back the tasks that it began with, or start it anew with --overwrite."
                )
            if self.drawn in wanted:
                found[self.drawn] = task
        return found
