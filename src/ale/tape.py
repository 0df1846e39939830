"""Where a run passes the points at which its order is decided, and what came in from outside: recorded, or played.

    await bus.tape.reach("end", "g3/1")                                          a step of the loop itself
    turn = await bus.tape.answer("turn", "g3/1", lambda: policy.generate(request), Turn)   from outside

What a run does between two such points it does without waiting, and all that its actors share changes there. So a run
that passes the same points in the same order, with the same answers, is the same run: what is left to chance (the
clock, the sampler, commands, other processes) comes in at these points and nowhere else. `data/recording.py` writes
them down; `replay.py` plays them, where each point waits for its turn.

Where nothing is recorded, a point costs one call. It never suspends, so recording does not change the order either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

Point = Literal[
    "open",  # a group of the next task
    "start",  # a rollout of a group
    "begin",  # the environment manager takes a rollout up
    "end",  # a rollout's trajectory is looked at: kept or dropped
    "redundant",  # a group has all its members: what else of it runs is cancelled
    "outdated",  # groups that are too old for the next batch are ended
    "group",  # every rollout of a group has ended: buffered or dropped
    "tasks end",  # no other group will be opened
    "heard",  # the buffer takes a message up
    "ask",  # the trainer asks for the batch of an update
    "look",  # the buffer looks whether it has a batch
    "step",  # the learner has made an update
    "live",  # the policy samples from new weights
    "turn",  # the answers from outside: of the policy,
    "reset",  # of the environment,
    "act",
    "score",
    "judge",  # of a program's own reward function,
    "play",  # of an agent that is a program: a whole episode
]


class Tape(Protocol):
    def covers(self, rollout: str) -> bool:
        """Whether the answers that this rollout gets are part of it. Those of an evaluation are not."""

    async def reach(self, point: Point, name: str) -> None: ...

    async def answer(self, point: Point, name: str, ask: Callable[[], Awaitable[Any]], type_: Any) -> Any:
        """What `ask` gives or raises; `type_` is the type of it."""


class Blank:
    """The tape of a run that is not recorded."""

    def covers(self, rollout: str) -> bool:
        return False

    async def reach(self, point: Point, name: str) -> None:
        pass

    async def answer(self, point: Point, name: str, ask: Callable[[], Awaitable[Any]], type_: Any) -> Any:
        return await ask()
