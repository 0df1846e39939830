"""States that a run can be resumed from: `state/1/`, `state/2/`, ... of which the last two are kept.

    state/2/learner.safetensors   weights, optimizer, schedule, older versions that samples still refer to
    state/2/books.msgpack         the controller's books at that moment, with the place in the journal
    state/2/SHA256SUMS            of the two, as `sha256sum -c` reads it; written last

A checkpoint is made in a directory of another name, flushed to the disk and then renamed: what has its number is whole.
The highest number is the latest.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec

from ale.data.books import Books
from ale.data.disk import sync
from ale.errors import RunFolderError

_KEPT = 2
_SUMS = "SHA256SUMS"
_UNFINISHED = "unfinished"


class _Saved(msgspec.Struct, frozen=True):
    """`_Saved(journal=40960, books=Books(...))`: what follows the books stands in the journal from that byte on."""

    journal: int
    books: Books


class Checkpoint(msgspec.Struct, frozen=True):
    """`Checkpoint(path=Path("runs/a/state/2"), journal=40960, books=Books(...))`: read and verified."""

    path: Path
    journal: int
    books: Books

    @property
    def learner(self) -> Path:
        return self.path / "learner.safetensors"


class Checkpoints:
    """The directory `state/` of a run folder. Blocking: call `commit` and `latest` from a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> Path:
        """Where the learner is to write its part: in a directory that is no checkpoint yet."""
        directory = self._path / _UNFINISHED
        try:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError.cannot_write(directory, error) from error
        return directory / "learner.safetensors"

    def commit(self, saved: bytes) -> Path:
        """Adds the books, as `freeze` made them, and makes a checkpoint of it. Raises `RunFolderError`."""
        directory = self._path / _UNFINISHED
        numbers = self._numbers()
        target = self._path / str(numbers[-1] + 1 if numbers else 1)
        try:
            (directory / "books.msgpack").write_bytes(saved)
            files = sorted(directory.iterdir())
            (directory / _SUMS).write_text("".join(f"{_sum_of(file)}\n" for file in files))
            for path in (*directory.iterdir(), directory):
                sync(path)
            directory.rename(target)
            sync(self._path)
            for number in numbers[: 1 - _KEPT]:
                shutil.rmtree(self._path / str(number))
        except OSError as error:
            raise RunFolderError.cannot_write(target, error) from error
        return target

    def latest(self) -> Checkpoint | None:
        """Raises `RunFolderError`, which names the file that is damaged and the cure."""
        numbers = self._numbers()
        if not numbers:
            return None
        path = self._path / str(numbers[-1])
        cure = (
            f"Delete {path} and resume again: the run then goes back to {self._path / str(numbers[-2])}, which the "
            "journal brings up to date, so that nothing is lost but the time to make some updates again."
            if len(numbers) > 1
            else "There is no older one: put the file back as it was, or start the run anew with --overwrite."
        )
        try:
            sums = (path / _SUMS).read_text().splitlines()
            for name in ("books.msgpack", "learner.safetensors"):
                if _sum_of(path / name) not in sums:
                    raise RunFolderError(
                        f"The checkpoint file {path / name} is damaged: its checksum does not agree. {cure}"
                    )
            saved = msgspec.msgpack.decode((path / "books.msgpack").read_bytes(), type=_Saved)
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise RunFolderError(f"The checkpoint {path} cannot be read: {error}. {cure}") from error
        return Checkpoint(path, saved.journal, saved.books)

    def _numbers(self) -> list[int]:
        if not self._path.is_dir():
            return []
        return sorted(int(entry.name) for entry in self._path.iterdir() if entry.name.isdecimal())


def freeze(books: Books, journal: int) -> bytes:
    """The books as they are now, for `Checkpoints.commit`: they may go on changing meanwhile."""
    return msgspec.msgpack.encode(_Saved(journal, books))


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}"
