"""Sockets of the host that a sandbox shows inside: addresses that outlive an incarnation, listeners that do not."""

from __future__ import annotations

from pathlib import Path

from ale.errors import SandboxError
from ale.sandbox.rocklet_client import RockletClient
from ale.sandbox.stream import Stream
from ale.sandbox.tunnel import Relays


class Exposed:
    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        self._outside: dict[bytes, Path] = {}  # address inside -> socket outside
        self._listeners: dict[bytes, Stream] = {}

    def add(self, address: bytes, outside: Path) -> None:
        """From the next incarnation on."""
        self._outside[address] = outside

    def check_free(self, address: bytes) -> None:
        if address in self._outside:
            raise ValueError(f"{address.decode('utf-8', 'replace')} is exposed already")

    async def show(self, rocklet: RockletClient, address: bytes, outside: Path) -> None:
        """From now on, and in every later incarnation. Raises OSError when the address cannot be had inside."""
        listener = await self._listen(rocklet, address, outside)
        self._outside[address], self._listeners[address] = outside, listener

    async def show_again(self, rocklet: RockletClient) -> None:
        """All of them, in an incarnation that has just begun."""
        for address, outside in self._outside.items():
            try:
                self._listeners[address] = await self._listen(rocklet, address, outside)
            except OSError as error:
                raise SandboxError(f"cannot listen again at {address!r}: {error}") from error

    def hide(self, address: bytes) -> None:
        del self._outside[address]
        self._listeners.pop(address).reset()

    async def _listen(self, rocklet: RockletClient, address: bytes, outside: Path) -> Stream:
        return await rocklet.listen(address, lambda stream: self._relays.connect_out(stream, outside))
