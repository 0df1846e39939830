"""Which tasks to spend rollouts on: by how often the policy solves their kind, which is a family at one level.

What is always solved teaches nothing, and a batch that is full of it moves the policy towards what it does anyway; what
is never solved teaches nothing either. What is solved now and then is where a success says something (arXiv 2512.24873,
3.2: keep tasks of moderate pass rate).
"""

from __future__ import annotations

import msgspec

from ale.config import Selection

_LEAST = 0.1  # of the tasks of a kind that says nothing now: else a loss of what was learned would go unseen
_MEMORY = 0.98  # an old outcome counts half after 34 newer ones of its kind


class Outcomes(msgspec.Struct, frozen=True, array_like=True):
    """Solved and all scored rollouts of one kind of task, the recent ones weighing more."""

    solved: float = 0.0
    scored: float = 0.0

    def after(self, solved: bool) -> Outcomes:
        return Outcomes(_MEMORY * self.solved + solved, _MEMORY * self.scored + 1)

    def chance(self, selection: Selection) -> float:
        """With which a task of this kind is taken; never below a tenth.

        "unsolved": the share of failures, so 1 where nothing was ever solved.
        "moderate": 1 where half is solved or nothing is known, falling to the ends like the variance of the reward,
        which is what a group's advantages are made of.
        """
        if selection == "all":
            return 1.0
        if selection == "unsolved":
            return max(_LEAST, 1 - self.solved / (self.scored + 1))
        rate = (self.solved + 1) / (self.scored + 2)
        return max(_LEAST, 4 * rate * (1 - rate))
