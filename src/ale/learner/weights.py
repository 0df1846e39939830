"""Weights shared between the learner and the engines, without copying on the reading side.

A ring of slots in anonymous shared memory holds the last `slots` policy versions. The learner copies a new version into
the next slot; an engine points its parameters at that slot; the learner evaluates old tokens under old slots.
With `max_lag + 2` slots the one being written is never one that is still read.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor, nn

_ALIGN = 64


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """`Entry("lm_head.weight", "float32", (640, 128), 0)`: one parameter and its offset within a slot, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Layout(msgspec.Struct, frozen=True):
    entries: tuple[Entry, ...]
    slot_bytes: int
    slots: int

    @classmethod
    def of(cls, model: nn.Module, slots: int) -> Layout:
        entries, offset = [], 0
        for name, parameter in model.named_parameters():
            dtype = str(parameter.dtype).removeprefix("torch.")
            entries.append(Entry(name, dtype, tuple(parameter.shape), offset))
            size = parameter.numel() * parameter.element_size()
            offset += -(-size // _ALIGN) * _ALIGN
        return cls(tuple(entries), offset, slots)


def create_memory() -> int:
    """A file descriptor of anonymous shared memory: it has no name, so no crash can leave it behind."""
    return os.memfd_create("ale-weights", os.MFD_CLOEXEC)


class WeightRing:
    """One process's view of the ring. `fd` comes from `create_memory`; whoever passes `layout` first sizes it."""

    def __init__(self, fd: int, layout: Layout) -> None:
        size = layout.slot_bytes * layout.slots
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self.layout = layout
        self._memory = mmap.mmap(fd, size)

    def slot_of(self, version: int) -> int:
        return version % self.layout.slots

    def views(self, slot: int) -> dict[str, Tensor]:
        """The parameters in a slot, by name, without a copy."""
        if not 0 <= slot < self.layout.slots:
            raise ValueError(f"slot: expected 0 to {self.layout.slots - 1}, got {slot}")
        views = {}
        for entry in self.layout.entries:
            dtype: torch.dtype = getattr(torch, entry.dtype)
            count = 1
            for n in entry.shape:
                count *= n
            flat = torch.frombuffer(
                self._memory, dtype=dtype, count=count, offset=slot * self.layout.slot_bytes + entry.offset
            )
            views[entry.name] = flat.view(entry.shape)
        return views

    def publish(self, version: int, model: nn.Module) -> int:
        """Copies the model's parameters into the slot of `version` and returns that slot."""
        slot = self.slot_of(version)
        parameters: Mapping[str, Tensor] = dict(model.named_parameters())
        with torch.no_grad():
            for name, view in self.views(slot).items():
                view.copy_(parameters[name])
        return slot

    def adopt(self, slot: int, model: nn.Module) -> None:
        """Points the model's parameters at a slot: nothing is copied, tied parameters stay tied."""
        views = self.views(slot)
        for name, parameter in model.named_parameters():
            parameter.data = views[name]
