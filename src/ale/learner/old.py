"""pi_old: the log-probability of each sampled token under the weights that sampled it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ale.learner.batch import MicroBatch
from ale.learner.forward import PolicyModel, routed
from ale.learner.ranks import Ranks
from ale.learner.versions import Versions
from ale.messages import Trajectory

PolicyOld = Literal["snapshot", "mu", "proximal"]
Split = Callable[[Sequence[Trajectory]], list[MicroBatch]]


class OldLogp:
    """`leave_fresh`: tokens of the version in training are left to the training forward. A router's loss is not divided
    by Z, so with one everything is computed here."""

    def __init__(
        self,
        policy: PolicyModel,
        versions: Versions,
        ranks: Ranks,
        split: Split,
        *,
        mode: PolicyOld,
        temperature: float,
        leave_fresh: bool,
    ) -> None:
        self._policy = policy
        self._versions = versions
        self._ranks = ranks
        self._split = split
        self._mode = mode
        self._temperature = temperature
        self._leave_fresh = leave_fresh

    def of(self, own: Sequence[Trajectory], idle: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """log pi_old [A] of each trajectory of this rank by id, and where it is left to the training forward (bool [A];
        NaN there). Raises `LearnerError` where weights are gone, on all ranks."""
        recorded = {t.id: torch.from_numpy(t.logp_A.numpy().copy()) for t in own}
        nowhere = {id_: torch.zeros_like(logp, dtype=torch.bool) for id_, logp in recorded.items()}
        if self._mode == "mu":
            return recorded, nowhere
        old = {id_: torch.full_like(logp, math.nan) for id_, logp in recorded.items()}
        now = self._versions.now
        version_of = {
            t.id: torch.full((len(t.logp_A),), now)
            if self._mode == "proximal"
            else torch.from_numpy(t.version_A.numpy().copy())
            for t in own
        }
        fresh = {id_: version_A == now for id_, version_A in version_of.items()} if self._leave_fresh else nowhere
        mine = {int(v) for id_, version_A in version_of.items() for v in set(version_A[~fresh[id_]].tolist())}
        for version in sorted(set().union(*self._ranks.gather(mine))):
            with self._versions.under(version):
                members = [t for t in own if bool((version_of[t.id] == version).any())]
                for ids, logp_A in self._forward(members, idle):
                    for id_, logp in zip(ids, torch.split(logp_A, [len(recorded[i]) for i in ids]), strict=True):
                        here = version_of[id_] == version
                        old[id_][here] = logp[here]
        return old, fresh

    @torch.no_grad()
    def _forward(self, members: Sequence[Trajectory], idle: MicroBatch) -> list[tuple[list[str], Tensor]]:
        batches = self._split(members)
        found = []
        for number in range(self._ranks.most(len(batches))):
            batch = batches[number] if number < len(batches) else idle
            with routed(self._policy.model, batch):
                logp_A = self._policy(batch, self._temperature)[0].cpu()
            if number < len(batches):
                found.append(([members[i].id for i in batch.index], logp_A))
        return found
