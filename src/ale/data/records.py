"""A file that only grows: a record for each thing that happened, each with its checksum.

    record = length of the body (u32) | CRC-32 of the body (u32) | CRC-32 of these two (u32) | body

A record is handed to the kernel before `add` returns, so SIGKILL at any moment leaves whole records and at most one
torn one, the last, which is cut off when the file is opened again. A loss of power may take the end of the file with
it; `sync` bounds that.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ale.data.disk import AppendedFile
from ale.errors import RunFolderError

HEADER = struct.Struct("<III")


class Records(AppendedFile):
    """`damaged` makes the error of what is said to be wrong with the file."""

    def __init__(self, path: Path, damaged: Callable[[str], RunFolderError]) -> None:
        super().__init__(path)
        self.damaged = damaged

    def add(self, body: bytes) -> None:
        """When this returns, no end of this process can undo it. Raises `RunFolderError`: the disk is full."""
        head = struct.pack("<II", len(body), zlib.crc32(body))
        self.append(head + struct.pack("<I", zlib.crc32(head)) + body)

    def bodies(self, offset: int = 0) -> Iterator[bytes]:
        """The bodies of whole records; ends before a torn one, raises where a whole one is damaged."""
        if offset > self.size:
            raise self.damaged(f"it ends at byte {self.size}, a checkpoint was taken at byte {offset}")
        yield from read_records(self.path, self.size, self.damaged, offset)


def read_records(path: Path, size: int, damaged: Callable[[str], RunFolderError], offset: int = 0) -> Iterator[bytes]:
    """Reads only, so that it may be used beside a process that writes."""
    with path.open("rb") as file:
        file.seek(offset)
        while offset + HEADER.size <= size:
            head = file.read(HEADER.size)
            length, checksum, head_checksum = HEADER.unpack(head)
            end = offset + HEADER.size + length
            if zlib.crc32(head[:8]) != head_checksum:
                raise damaged(f"there is no record at byte {offset}")
            if end > size:
                return
            body = file.read(length)
            if zlib.crc32(body) != checksum:
                if end == size:  # the blocks of the last write did not all reach the disk
                    return
                raise damaged(f"the checksum of the record at byte {offset} does not agree")
            yield body
            offset = end
