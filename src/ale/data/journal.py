"""The journal of a run: one file that only grows, a record for each thing that happened, each with its checksum.

    record = length of the body (u32) | CRC-32 of the body (u32) | CRC-32 of these two (u32) | body
    body   = msgpack of [seconds since the run began, event]

A record is handed to the kernel before anything acts on what it says, so SIGKILL at any moment leaves whole records and
at most one torn one, the last, which is cut off when the journal is opened again. A loss of power may take the end of
the file with it; `sync` bounds that.
"""

from __future__ import annotations

import logging
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ale.data.disk import AppendedFile
from ale.data.events import Event
from ale.errors import RunFolderError

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<III")


class Journal(AppendedFile):
    """Appends `Event`s. `elapsed_s` counts on from the last record: the run's wall time over all of its lives."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it. Raises `RunFolderError` when something in it is damaged."""
        super().__init__(path)
        self._decoder = msgspec.msgpack.Decoder(tuple[float, Event])
        self._encoder = msgspec.msgpack.Encoder()
        try:
            self._before_s = self._mend()
        except BaseException:
            self.close()
            raise
        self._opened = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._opened

    def write(self, event: Event) -> None:
        """When this returns, no end of this process can undo it. Raises `RunFolderError`: the disk is full."""
        body = self._encoder.encode((self.elapsed_s, event))
        head = struct.pack("<II", len(body), zlib.crc32(body))
        self.append(head + struct.pack("<I", zlib.crc32(head)) + body)

    def read(self, offset: int = 0) -> Iterator[Event]:
        """The events from `offset` on, which is what `size` was at some time."""
        for body in self._bodies(offset):
            yield self._decode(body)[1]

    def _decode(self, body: bytes) -> tuple[float, Event]:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise self._damaged(f"another version of ale wrote it ({error})") from error

    def _mend(self) -> float:
        """Cuts off a torn last record. Returns the time of the last whole one."""
        elapsed_s, end = 0.0, 0
        for body in self._bodies(0):
            elapsed_s = self._decode(body)[0]
            end += _HEADER.size + len(body)
        if end < self.size:
            logger.warning("%s: the last record was cut off in the middle; its %d bytes go", self.path, self.size - end)
            self.cut(end)
        return elapsed_s

    def _bodies(self, offset: int) -> Iterator[bytes]:
        """The bodies of whole records; ends before a torn one, raises where a whole one is damaged."""
        if offset > self.size:
            raise self._damaged(f"it ends at byte {self.size}, a checkpoint was taken at byte {offset}")
        with self.path.open("rb") as file:
            file.seek(offset)
            while offset + _HEADER.size <= self.size:
                head = file.read(_HEADER.size)
                length, checksum, head_checksum = _HEADER.unpack(head)
                end = offset + _HEADER.size + length
                if zlib.crc32(head[:8]) != head_checksum:
                    raise self._damaged(f"there is no record at byte {offset}")
                if end > self.size:
                    return
                body = file.read(length)
                if zlib.crc32(body) != checksum:
                    if end == self.size:  # the blocks of the last write did not all reach the disk
                        return
                    raise self._damaged(f"the checksum of the record at byte {offset} does not agree")
                yield body
                offset = end

    def _damaged(self, said: str) -> RunFolderError:
        return RunFolderError(
            f"The journal {self.path} is damaged: {said}. The run cannot be resumed from it: put the file back as it "
            "was, or start the run anew with --overwrite. Its checkpoints can still be evaluated."
        )
