"""Terminals: the engine's end of a command on a pseudo-terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from ale.errors import DeadlineExceeded, SandboxError, UserError
from ale.sandbox.rocklet.wire import RESIZE
from ale.sandbox.stream import Stream

_SEND_S = 30.0
# What `screen` is drawn from: far more than any screen holds, little enough to draw in a few hundredths of a second.
_SCROLLBACK_BYTES = 65536
_MAX_SIDE = 1000


class TerminalSession:
    """Reads what comes all the time, so that the command does not stop for want of a reader: the latest is kept."""

    def __init__(self, stream: Stream, rows: int, columns: int) -> None:
        self._stream = stream
        self._rows, self._columns = rows, columns
        self._shown = bytearray()
        self._unread = bytearray()
        self._changed = asyncio.Condition()
        self._ended = False

    async def listen(self) -> None:
        try:
            while data := await self._stream.read(None):
                async with self._changed:
                    for kept in (self._shown, self._unread):
                        kept += data
                        del kept[:-_SCROLLBACK_BYTES]
                    self._changed.notify_all()
        except (OSError, SandboxError):
            pass  # told by what is asked of the stream next
        finally:
            self._ended = True
            with suppress(asyncio.CancelledError):
                async with self._changed:
                    self._changed.notify_all()

    async def send(self, keys: str | bytes) -> None:
        await self._stream.write(keys.encode() if isinstance(keys, str) else keys, _SEND_S)

    async def read(self, *, deadline_s: float) -> bytes:
        await self._until(lambda: bool(self._unread) or self._ended, "output of a terminal", deadline_s)
        data = bytes(self._unread)
        self._unread.clear()
        return data

    async def wait(self, *, deadline_s: float) -> int:
        await self._until(lambda: self._ended, "the end of a terminal's command", deadline_s)
        if self._stream.status is None:
            raise SandboxError("the terminal was lost with its sandbox or connection")
        return self._stream.status

    async def _until(self, holds: Callable[[], bool], what: str, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(holds)
        except TimeoutError as error:
            raise DeadlineExceeded(what, deadline_s) from error

    async def screen(self) -> tuple[str, ...]:
        return await asyncio.to_thread(draw, bytes(self._shown), self._rows, self._columns)

    async def resize(self, rows: int, columns: int) -> None:
        check_size(rows, columns)
        self._rows, self._columns = rows, columns
        self._stream.resize(RESIZE, rows, columns)


def check_size(rows: int, columns: int) -> None:
    for name, value in (("rows", rows), ("columns", columns)):
        if not 1 <= value <= _MAX_SIDE:
            raise ValueError(f"a terminal's {name} must be in 1..{_MAX_SIDE}, got {value}")


def draw(printed: bytes, rows: int, columns: int) -> tuple[str, ...]:
    """The screen of a VT100 after `printed`, a string per row without trailing spaces. Blocks."""
    try:
        import pyte
    except ImportError as error:
        raise UserError("Terminal.screen() needs pyte: pip install 'ale[terminal]'") from error
    screen = pyte.Screen(columns, rows)
    try:
        pyte.ByteStream(screen).feed(printed)
    except Exception as error:  # what a hostile program prints is a parser's worst case
        raise SandboxError(f"what the terminal printed cannot be drawn: {error!r}") from error
    return tuple(line.rstrip() for line in screen.display)


@asynccontextmanager
async def attend(stream: Stream, rows: int, columns: int) -> AsyncIterator[TerminalSession]:
    """A terminal over its stream. Its end kills the command."""
    terminal = TerminalSession(stream, rows, columns)
    listening = asyncio.ensure_future(terminal.listen())
    try:
        yield terminal
    finally:
        stream.reset()
        listening.cancel()
        await asyncio.wait([listening])
