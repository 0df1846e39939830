"""The processes that make one update together, each a rank: what they tell each other besides gradients.

Every rank sees every request, so most of what they have to agree on follows from it: who takes which samples, which
earlier weights are needed, in what order. The rest is gathered, and read in order of rank, so that all of them come to
the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ale.errors import LearnerError

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """`Ranks()` is a learner of one process: nothing is sent."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    mesh: DeviceMesh | None = None
    """What parameters are sharded over; None where they are not."""
    talk: dist.ProcessGroup | None = None
    """For small things on the CPU, whatever the device computes."""

    @classmethod
    def join(cls, store: str, rank: int, size: int, device: str, deadline_s: float) -> Ranks:
        """Meets the others, who name the same `store` (a file). No collective waits longer than `deadline_s`."""
        own = torch.device(device, rank) if device == "cuda" else torch.device(device)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if device == "cuda":
            torch.cuda.set_device(own)
        timeout = timedelta(seconds=deadline_s)
        dist.init_process_group(backend, store=FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
        return cls(rank, size, own, init_device_mesh(device, (size,)), dist.group.WORLD)

    def gather(self, value: T) -> list[T]:
        """What each rank gave, in order of rank. All of them have to call it."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.talk)
        return values  # type: ignore[return-value]

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def most(self, count: int) -> int:
        return max(self.gather(count))

    def agree(self, error: Exception | None) -> None:
        """Raises where any of the ranks brings an error: all of them, so that none waits for the others."""
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        first = next((said for said in errors if said is not None), None)
        if first is None:
            return
        if self.size == 1 and error is not None:
            raise error
        raise LearnerError(first)

    def share(self, costs: Sequence[float]) -> range:
        """The samples of this rank: a run of neighbours, so that a group stays together where it can, cut where the sum
        of the costs comes nearest to an even part."""
        if self.size == 1:
            return range(len(costs))
        ends = list(accumulate(costs))
        cuts = [0]
        for part in range(1, self.size):
            goal = ends[-1] * part / self.size if ends else 0.0
            cut = min(range(len(ends) + 1), key=lambda n: abs((ends[n - 1] if n else 0.0) - goal))
            cuts.append(max(cut, cuts[-1]))
        cuts.append(len(costs))
        return range(cuts[self.rank], cuts[self.rank + 1])
