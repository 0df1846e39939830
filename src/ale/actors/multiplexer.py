"""Train-rollout multiplexing: one pool of devices, all of it for rollouts but during an update.

Rollout demand peaks after new weights and falls into a valley of stragglers; training is a short burst. So all devices
start on rollouts, *shrink* moves a fixed part of them to the trainer when it has its batch, and *expand* gives it back
after the update (arXiv 2512.24873, 3.1). `share` decides, a pure function of demand; `Devices` carries it out.

On CPU a device is a thread of the engine. On GPUs it would be an engine that sleeps and wakes; there is none yet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

Resize = Callable[[int], Awaitable[None]]
"""Gives rollouts so many devices: returns when what runs there has been moved."""


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """`Pool(devices=8, training=4)`: an update takes 4 of the 8. The part is fixed, as a model that is sharded over
    devices cannot be sharded over others from one update to the next."""

    devices: int
    training: int

    def __post_init__(self) -> None:
        if not 0 < self.training < self.devices:
            raise ValueError(f"an update takes between 1 and {self.devices - 1} of {self.devices}, not {self.training}")


class Share(msgspec.Struct, frozen=True):
    """`Share(rollouts=4, training=4)`"""

    rollouts: int
    training: int


def share(pool: Pool, *, ready: int, wanted: int, updating: bool) -> Share:
    """Who has what, where `ready` groups wait in the buffer and an update is made of `wanted`: the trainer takes its
    part when it has something to do with it, and only then."""
    training = pool.training if updating or ready >= wanted else 0
    return Share(pool.devices - training, training)


class Devices:
    """What the trainer knows of the pool. Without a pool, rollouts and trainer have devices of their own."""

    def __init__(self, pool: Pool | None = None, resize: Resize | None = None) -> None:
        self._pool = pool
        self._resize = resize
        self.shrunk = 0
        """How often rollouts gave devices up."""

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Around an update, whose batch was taken: it is `wanted` and `ready` at once."""
        if self._pool is None or self._resize is None:
            yield
            return
        await self._resize(share(self._pool, ready=1, wanted=1, updating=True).rollouts)
        self.shrunk += 1
        try:
            yield
        finally:
            await self._resize(share(self._pool, ready=0, wanted=1, updating=False).rollouts)


async def open_devices(pool: Pool, resize: Resize) -> Devices:
    """All devices go to rollouts."""
    await resize(share(pool, ready=0, wanted=1, updating=False).rollouts)
    return Devices(pool, resize)
