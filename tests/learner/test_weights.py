import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ale.learner.weights import Layout, WeightRing, create_memory
from ale.models.load import load_model


def span(ring: WeightRing) -> tuple[int, int]:
    start = ctypes.addressof(ctypes.c_char.from_buffer(ring._memory))
    return start, start + len(ring._memory)


def test_adopting_copies_nothing_and_keeps_tied_weights_tied(nano: Any, nano_path: Path) -> None:
    fd = create_memory()
    writer = WeightRing(fd, Layout.of(nano, 3))
    reader = WeightRing(fd, Layout.of(nano, 3))  # another view of the same memory, as another process has
    with torch.no_grad():
        for weight in nano.parameters():
            weight += 0.1
    slot = writer.publish(4, nano)
    assert slot == 1
    other = load_model(nano_path)
    reader.adopt(slot, other)
    low, high = span(reader)
    for (name, mine), theirs in zip(nano.named_parameters(), other.parameters(), strict=True):
        assert low <= theirs.data_ptr() < high, name
        assert torch.equal(mine, theirs), name
    assert other.get_output_embeddings().weight.data_ptr() == other.get_input_embeddings().weight.data_ptr()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(nano(ids).logits, other(ids).logits)
        # What the writer writes into that slot is there at once.
        nano.get_input_embeddings().weight.zero_()
        writer.publish(4, nano)
        assert not other.get_output_embeddings().weight.any()
    os.close(fd)


def test_slots_wrap_and_do_not_touch_each_other(nano: Any) -> None:
    ring = WeightRing(create_memory(), Layout.of(nano, 3))
    for version in range(5):
        with torch.no_grad():
            for weight in nano.parameters():
                weight.fill_(version)
        assert ring.publish(version, nano) == version % 3
    for version in (2, 3, 4):
        for name, view in ring.views(ring.slot_of(version)).items():
            assert (view == version).all(), name


def test_a_slot_that_is_not_there_is_refused(nano: Any) -> None:
    ring = WeightRing(create_memory(), Layout.of(nano, 2))
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=f"slot: expected 0 to 1, got {slot}"):
            ring.views(slot)


def test_every_entry_is_aligned_and_the_layout_survives_a_round_trip(nano: Any) -> None:
    from ale.wire import round_trip

    layout = Layout.of(nano.bfloat16(), 2)
    assert all(entry.offset % 64 == 0 for entry in layout.entries)
    assert layout.slot_bytes % 64 == 0
    assert round_trip(layout) == layout
    ring = WeightRing(create_memory(), layout)
    ring.publish(0, nano)
    for name, weight in nano.named_parameters():
        assert torch.equal(ring.views(0)[name], weight)
