"""The reward actor: runs the tests of finished episodes, a few at once, apart from the agents' own sandboxes."""

from __future__ import annotations

from ale.actor import Actor
from ale.bus import Bus
from ale.envs.grade import grade
from ale.messages import Grade, Score
from ale.sandbox import SandboxEngine, Snapshot
from ale.task import Task
from ale.wire import Message

# On top of the tests' own time-out: the wait for a turn, and making the sandbox.
_QUEUE_DEADLINE_S = 300.0


class Reward(Actor):
    cancel_abandoned = True

    def __init__(self, engine: SandboxEngine, *, concurrency: int, label: str = "") -> None:
        super().__init__("reward", capacity=1024, concurrency=concurrency)
        self._engine = engine
        self._label = label
        self._snapshots: dict[str, Snapshot] = {}

    async def receive(self, message: Message) -> Score | None:
        match message:
            case Grade(task=task, snapshot=name):
                return await grade(self._engine, task, self._snapshots[name], label=self._label)
            case _:
                await super().receive(message)
        return None

    async def ask(self, bus: Bus, task: Task, snapshot: Snapshot) -> Score:
        """What a `TerminalEnv` calls: a snapshot stays with its engine, its name crosses the bus."""
        name = f"{task.id}/{id(snapshot)}"
        self._snapshots[name] = snapshot
        try:
            request = Grade(task=task, snapshot=name)
            return await bus.ask("reward", request, deadline_s=task.verifier_timeout_s + _QUEUE_DEADLINE_S)
        finally:
            del self._snapshots[name]
