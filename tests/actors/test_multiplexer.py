"""One pool of devices: who has what is a function of demand, and the trainer never has it longer than an update."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ale.actors.multiplexer import Pool, Share, open_devices, share
from ale.errors import LearnerError
from ale.testing.clock import run

POOL = Pool(devices=8, training=3)


@pytest.mark.parametrize(
    ("ready", "updating", "has"),
    [
        (0, False, Share(8, 0)),  # rollouts have everything
        (3, False, Share(8, 0)),
        (4, False, Share(5, 3)),  # a batch is there: shrink
        (0, True, Share(5, 3)),
    ],
)
def test_the_trainer_has_its_part_when_it_has_something_to_do(ready: int, updating: bool, has: Share) -> None:
    assert share(POOL, ready=ready, wanted=4, updating=updating) == has


@given(st.integers(2, 64), st.data(), st.integers(0, 20), st.integers(1, 20), st.booleans())
def test_every_device_is_somewhere_and_rollouts_never_have_none(
    devices: int, data: st.DataObject, ready: int, wanted: int, updating: bool
) -> None:
    pool = Pool(devices=devices, training=data.draw(st.integers(1, devices - 1)))
    has = share(pool, ready=ready, wanted=wanted, updating=updating)
    assert has.rollouts + has.training == devices
    assert has.rollouts >= 1


@pytest.mark.parametrize("training", [0, 8, 9])
def test_a_part_that_leaves_nothing_is_refused(training: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 7 of 8, not {training}"):
        Pool(devices=8, training=training)


def test_devices_go_to_the_trainer_for_an_update_and_come_back_when_it_fails() -> None:
    async def scenario() -> None:
        log: list[int] = []

        async def resize(devices: int) -> None:
            log.append(devices)

        devices = await open_devices(POOL, resize)
        async with devices.training():
            await asyncio.sleep(1.0)
        with pytest.raises(LearnerError):
            async with devices.training():
                raise LearnerError("out of memory")
        assert log == [8, 5, 8, 5, 8]
        assert devices.shrunk == 2

    run(scenario())
