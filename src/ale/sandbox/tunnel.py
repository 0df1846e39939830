"""Tunnels: connections between unix sockets of the host and addresses inside a sandbox, relayed under credit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.port import Address
from ale.sandbox.rocklet.wire import PIECE_BYTES
from ale.sandbox.stream import Stream

_CONNECT_S, _END_S = 10.0, 10.0
_BROKEN = (OSError, SandboxError, DeadlineExceeded, asyncio.IncompleteReadError)


def encode(address: Address) -> bytes:
    """As the rocklet has it: `tcp:PORT` or `unix:PATH`."""
    if isinstance(address, int):
        if not 0 < address < 65536:
            raise ValueError(f"a port is in 1..65535, got {address}")
        return b"tcp:%d" % address
    if not address.startswith("/") or "\0" in address:
        raise ValueError(f"the path of a unix socket must be absolute, got {address!r}")
    return b"unix:" + os.fsencode(address)


class Relays:
    """The connections of one sandbox: owns their tasks, and ends them all at `close`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_END_S)

    def connect_out(self, stream: Stream, outside: Path) -> None:
        """Relays a connection that came from inside to a unix socket of the host, or resets it."""
        self.add(self._connect_out(stream, outside))

    async def _connect_out(self, stream: Stream, outside: Path) -> None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_unix_connection(outside)
        except (OSError, TimeoutError):
            stream.reset()
            return
        await relay(stream, reader, writer)

    @asynccontextmanager
    async def forward(self, outside: Path, connect: Callable[[], Awaitable[Stream]]) -> AsyncIterator[None]:
        """Listens at `outside`; each connection is relayed to what `connect` opens inside."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                stream = await connect()
            except _BROKEN:
                writer.transport.abort()
                return
            await relay(stream, reader, writer)

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.add(accept(reader, writer))

        mask = os.umask(0o177)  # only this user may connect
        try:
            server = await asyncio.start_unix_server(accepted, outside)
        finally:
            os.umask(mask)
        try:
            yield
        finally:
            server.close()
            with suppress(FileNotFoundError):
                os.unlink(outside)


async def relay(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Both ways until both have ended, or until one breaks, which breaks the other."""

    async def inwards() -> None:
        while data := await reader.read(PIECE_BYTES):
            await stream.write(data, None)
        stream.end()

    async def outwards() -> None:
        while data := await stream.read(None):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    try:
        async with asyncio.TaskGroup() as ways:
            ways.create_task(inwards())
            ways.create_task(outwards())
    except* _BROKEN:
        writer.transport.abort()
    finally:
        stream.reset()
        writer.close()
