"""Captures: the output pipes of a one-shot run, read by the event loop without ever waiting for them."""

from __future__ import annotations

import asyncio
import os

from ale.sandbox.rocklet.commands import FLOOD_BYTES, FLOOD_PAUSE_S, Output
from ale.sandbox.rocklet.system import CHUNK

_FULLEST_PIPE = 1 << 20  # what an unprivileged writer may enlarge a pipe to


class Capture:
    """A pipe whose `inlet` a command writes to. Use as a context manager; `finish()` once all writers have gone."""

    def __init__(self, keep: int) -> None:
        outlet, self.inlet = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(outlet, False)
        self._loop = asyncio.get_running_loop()
        self._output = Output(outlet, keep)
        self._pause: asyncio.TimerHandle | None = None
        self._reading = True
        self.ended = asyncio.Event()
        """Set when the last writer has gone."""
        self._listen()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self.close_inlet()
        os.close(self._output.fd)

    def close_inlet(self) -> None:
        if self.inlet >= 0:
            os.close(self.inlet)
            self.inlet = -1

    def finish(self) -> tuple[bytes, int]:
        """Takes what the pipe still holds; (kept bytes, dropped count)."""
        self._stop()
        for _ in range(_FULLEST_PIPE // CHUNK + 1):
            if not self._read():
                break
        return self._output.value(), self._output.dropped

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._output.fd, self._on_readable)

    def _on_readable(self) -> None:
        data = self._read()
        if data == b"":
            self.ended.set()
            self._stop()
        elif self._output.dropped > FLOOD_BYTES:  # a flood then costs its writer time instead of the loop
            self._loop.remove_reader(self._output.fd)
            self._pause = self._loop.call_later(FLOOD_PAUSE_S, self._listen)

    def _read(self) -> bytes | None:
        """One chunk; b"" at the end, None when there is nothing now."""
        try:
            data = os.read(self._output.fd, CHUNK)
        except BlockingIOError:
            return None
        self._output.take(data)
        return data

    def _stop(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._output.fd)
            if self._pause is not None:
                self._pause.cancel()
