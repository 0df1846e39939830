"""A session on disk: a folder with the transcript (`events.jsonl`, one event a line) and what must not be lost.

Sessions lie with the user's state, not in the project: a transcript holds whatever the agent read, and none of it
belongs into a commit or a sandbox.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ale.agent.events import AnyEvent, Compacted, Delegated, Ended, Said, Started, decode, encode
from ale.agent.model import Message, Usage
from ale.errors import RunFolderError

EVENTS = "events.jsonl"
GO_ON = "The session was interrupted here. Look at what is done already, then go on with the task."
"""What is said when a session is resumed without a task of its own."""
_CUT_OFF = "error: the session ended before this call had; it may have been carried out, in part or whole"


def sessions_directory() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "ale/sessions"


class Session:
    """Appends events. Each is on disk before the agent goes on; what a kill cuts off is at most the last line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / EVENTS
        try:
            _drop_cut_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RunFolderError(f"the session {folder} cannot be written: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RunFolderError(f"the session {self.id} is in use by another process.") from error

    def write(self, event: AnyEvent) -> None:
        """Whole, or not at all. Raises `RunFolderError` where the disk does not take it."""
        line, end = encode(event) + b"\n", self._file.tell()
        try:
            written = self._file.write(line)
            if written != len(line):  # the disk was full in the middle of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            self._file.seek(end)
            raise RunFolderError(
                f"the session {self.folder} cannot be written: {error.strerror}. It is whole up to here; make room, "
                f"then go on with: ale agent --resume {self.id}"
            ) from error

    def close(self) -> None:
        """Idempotent. A session in which nothing happened leaves nothing behind."""
        if not self._file.closed:
            empty = self._file.tell() == 0
            self._file.close()
            if empty:
                (self.folder / EVENTS).unlink()
                with contextlib.suppress(OSError):  # something else is kept there
                    self.folder.rmdir()

    @property
    def began(self) -> bool:
        """Whether it holds any event."""
        path = self.folder / EVENTS
        return path.is_file() and path.stat().st_size > 0

    @property
    def outputs(self) -> Path:
        """For results that are too long for the dialogue."""
        return self.folder / "outputs"

    @property
    def kept(self) -> Path:
        """For files that a change of the workspace would have lost."""
        return self.folder / "files"


def new_session(directory: Path | None = None) -> Session:
    """`directory`: where sessions are kept; None: with the user's state."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return Session((directory or sessions_directory()) / name)


def _drop_cut_line(path: Path) -> None:
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_events(path: Path) -> Iterator[AnyEvent]:
    """The events of a transcript; a last line that a kill cut off is no event. Raises `RunFolderError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"there is no transcript {path}: {error.strerror}") from error
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            yield decode(line)
        except msgspec.DecodeError as error:
            raise RunFolderError(f"{path}, line {number}, is damaged: {error}") from error


class Restored(msgspec.Struct, frozen=True):
    """A session as it stands: what the model sees, and what was spent."""

    messages: tuple[Message, ...]
    usage: Usage
    goal: str
    """The last task."""
    workspace: str = ""
    """Where it worked last: "local", "host"."""


def restore(path: Path) -> Restored:
    """Raises `RunFolderError`."""
    messages: list[Message] = []
    usage, goal, workspace, begins = Usage(), "", "", True
    for event in read_events(path):
        match event:
            case Said(message=message, usage=cost):
                messages.append(message)
                usage += cost or Usage()
                if message.role == "user" and begins:
                    goal, begins = goal if message.content == GO_ON else message.content, False
            case Compacted(messages=shorter, usage=cost):
                messages = list(shorter)
                usage += cost or Usage()
            case Delegated(usage=cost):
                usage += cost
            case Started(workspace=kind):
                workspace, begins = kind, True
            case Ended():
                begins = True
            case _:
                pass
    return Restored(tuple(_answered(messages)), usage, goal, workspace)


def _answered(messages: list[Message]) -> Iterator[Message]:
    """Every call gets a result: a server refuses a dialogue in which one is missing."""
    waiting: list[str] = []
    for message in messages:
        if message.role == "tool" and message.call_id in waiting:
            waiting.remove(message.call_id)
        elif message.role != "tool":
            yield from (Message("tool", _CUT_OFF, call_id=call) for call in waiting)
            waiting = []
        yield message
        waiting += [call.id for call in message.calls]
    yield from (Message("tool", _CUT_OFF, call_id=call) for call in waiting)


class Summary(msgspec.Struct, frozen=True):
    """A session in a line. `status` is None while it runs, or when it was killed."""

    id: str
    directory: str
    task: str
    status: str | None


def summaries(directory: Path | None = None) -> Iterator[Summary]:
    """The sessions of people, the newest first; a folder that holds none is left out."""
    for path in sorted((directory or sessions_directory()).glob(f"*/{EVENTS}"), reverse=True):
        started: Started | None = None
        task, status = "", None
        for event in read_events(path):
            match event:
                case Started():
                    started, status = event, None
                case Said(message=message) if message.role == "user" and not task:
                    task = " ".join(message.content.split())
                case Ended():
                    status = event.status
                case _:
                    pass
        if started is not None:
            yield Summary(path.parent.name, started.directory, task, status)


def directory_of(session: Path) -> str:
    """Where the session in this folder works. Raises `RunFolderError`."""
    return next(event.directory for event in read_events(session / EVENTS) if isinstance(event, Started))


def find_session(which: str, directory: Path, sessions: Path | None = None) -> Path:
    """The folder of a session: by its id, or "last", the newest of this directory. Raises `RunFolderError`."""
    root = sessions or sessions_directory()
    if which != "last":
        folder = root / which
        if "/" in which or not (folder / EVENTS).is_file():
            raise RunFolderError(f"there is no session {which!r} in {root}.")
        return folder
    for one in summaries(root):
        if one.directory == str(directory):
            return root / one.id
    raise RunFolderError(f"there is no session of {directory} in {root} to resume.")
