"""Writing to a run folder so that neither a kill nor a full disk leaves anything half done that was whole before."""

from __future__ import annotations

import os
from pathlib import Path

from ale.errors import RunFolderError


class AppendedFile:
    """A file that only grows: each `append` is handed to the kernel before it returns. `size` is in bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.size = os.fstat(self.fd).st_size

    def append(self, data: bytes) -> None:
        """All of `data` or nothing. Raises `RunFolderError`: the disk is full, say."""
        try:
            written = os.write(self.fd, data)
            if written < len(data):
                os.write(self.fd, data[written:])  # raises with what made the first come short
        except OSError as error:
            os.ftruncate(self.fd, self.size)  # what follows must not stand behind half a record
            raise RunFolderError.cannot_write(self.path, error) from error
        self.size += len(data)

    def cut(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.size = size

    def sync(self) -> None:
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def replace(path: Path, data: bytes) -> None:
    """Writes a whole file: whoever reads `path`, at any time, finds the old content or the new."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(data)
        sync(new)
        new.rename(path)
        sync(path.parent)
    except OSError as error:
        raise RunFolderError.cannot_write(path, error) from error


def sync(path: Path) -> None:
    """When this returns, no loss of power can undo what was written to the file or, for a directory, renamed in it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
