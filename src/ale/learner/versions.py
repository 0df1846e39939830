"""The last versions of the policy: published for the engines, and at hand to evaluate old tokens under (pi_old).

Whole models are kept by the ring, in memory that all ranks and engines share: each rank writes and reads its own rows
there, and nothing is sent. With adapters the ring has what the engines need, the adapters merged in, and earlier
adapters are kept beside it, on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ale.errors import LearnerError
from ale.learner.lora import adapters, plain_parameters
from ale.learner.ranks import Ranks
from ale.learner.sharding import local, rows, whole
from ale.learner.weights import WeightRing


class Versions:
    """`now` is the version in training. Publishing is of all ranks; what is published is whole when it returns."""

    def __init__(self, model: PreTrainedModel, ring: WeightRing, ranks: Ranks) -> None:
        self.now = 0
        self.slot = 0
        self._model = model
        self._ring = ring
        self._ranks = ranks
        self._adapters: dict[int, dict[str, Tensor]] | None = {} if adapters(model) else None

    def trained(self) -> dict[str, Tensor]:
        """The parameters that an update changes; sharded where the model is."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def publish(self, version: int) -> None:
        self.now, self.slot = version, self._ring.slot_of(version)
        merged = {name: (whole(a), whole(b), scale) for name, (a, b, scale) in adapters(self._model).items()}
        parameters = plain_parameters(self._model)
        for name, view in self._ring.views(self.slot).items():
            parameter = parameters[name]
            own = rows(parameter)
            view[own].copy_(local(parameter))
            if name in merged:
                a, b, scale = merged[name]
                view[own].add_(b[own] @ a, alpha=scale)
        if self._adapters is not None:
            self.keep(version, {name: whole(p).clone() for name, p in self.trained().items()})
        self._ranks.gather(None)

    def keep(self, version: int, weights: dict[str, Tensor]) -> None:
        """Puts earlier weights back (whole, by name), as a checkpoint has them."""
        if self._adapters is None:
            views = self._ring.views(self._ring.slot_of(version))
            for name, parameter in self.trained().items():
                own = rows(parameter)
                views[name][own].copy_(weights[name][own])
        else:
            self._adapters[version] = weights
            self._adapters.pop(version - self._ring.layout.slots, None)

    def weights(self, version: int) -> dict[str, Tensor]:
        """What was trained, as that version had it: whole, on the CPU. Raises `LearnerError` when it is gone."""
        if not self.now - self._ring.layout.slots < version <= self.now:
            raise LearnerError(f"the weights of version {version} are gone; training is at {self.now}")
        if self._adapters is not None:
            return self._adapters[version]
        return self._ring.views(self._ring.slot_of(version))

    @property
    def earlier(self) -> range:
        """Whose weights a sample may still refer to. The slot that is written next holds none of them."""
        return range(max(0, self.now - self._ring.layout.slots + 2), self.now)

    @contextmanager
    def under(self, version: int) -> Iterator[None]:
        """The model as it was at that version; at the end it is what it is now, to the bit."""
        if version == self.now:
            yield
            return
        then, now = self.weights(version), self.weights(self.now)
        self._put(then)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.trained().items():
            local(parameter).copy_(weights[name][rows(parameter)])
