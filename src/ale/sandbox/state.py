"""The engine's directory: where it lies, who may see it, and how a dead engine's is recognised and removed.

Its name holds the owner's pid and start time, and a lock file in it is held by the engine and by its launcher: the
name tells at once that an owner lives, the lock tells it across pid namespaces that share the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from ale.sandbox.cgroup import remove_groups
from ale.sandbox.launcher import remove_tree
from ale.sandbox.quota import unmount_below

logger = logging.getLogger(__name__)

PREFIX = "ale-sandbox-"
_LOCK, _CGROUPS = "lock", "cgroups"
_MIN_FREE_BYTES = 1 << 30
_DYING_S = 3.0  # how long the processes of a killed engine may take to die

SHARED_MEMORY = Path("/dev/shm")

# In the environment of what `unsafe-process` starts: the root of its sandbox, by which it is found again.
ROOT_MARK = "ALE_ROOT"

# Whom sandboxes run as when the engine is root: an id that no distribution gives out.
SANDBOX_USER = (64753, 64753)


def start_time(pid: int) -> str | None:
    """The process's start in clock ticks since boot, which with the pid names it for good; None: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def default_parent() -> Path:
    """Memory when it is roomy, executable and keeps overlayfs's attributes, else the system's temporary directory."""
    temporary = Path(tempfile.gettempdir())
    try:
        facts = os.statvfs(SHARED_MEMORY)
        if facts.f_flag & os.ST_NOEXEC or facts.f_bavail * facts.f_frsize < _MIN_FREE_BYTES:
            return temporary
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as probe:
            os.setxattr(probe.name, "user.overlay.probe", b"y")
    except OSError:
        return temporary
    return SHARED_MEMORY


def give(tree: Path, owner: tuple[int, int] | None) -> None:
    """Makes `owner` the owner of everything in a tree."""
    if owner is not None:
        for path in (tree, *tree.rglob("*")):
            os.chown(path, *owner, follow_symlinks=False)


class StateDirectory(msgspec.Struct, frozen=True):
    path: Path
    lock_fd: int

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def make(cls, parent: Path, owner: tuple[int, int] | None) -> StateDirectory:
        """Makes the directory, closed to every user but `owner` (and root)."""
        path = parent / f"{PREFIX}{os.getpid()}-{start_time(os.getpid())}-{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        try:
            lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            for name in ("boxes", "layers", "tools", "scratch"):
                (path / name).mkdir()
            give(path, owner)
        except BaseException:
            remove_tree(path)
            raise
        return cls(path, lock_fd)

    def record(self, groups: Iterable[str]) -> None:
        """Notes the engine's cgroups where the sweep finds them. Before they are made, so that none is ever unknown."""
        (self.path / _CGROUPS).write_text("\n".join(groups))

    def remove(self) -> None:
        """Removes what the launcher has not removed at its end, because it was killed. Idempotent."""
        if self.path.exists():
            _end_processes(self.name)
            unmount_below(self.path)
            remove_tree(self.path)
        with contextlib.suppress(OSError):
            os.close(self.lock_fd)


def owner_lives(name: str) -> bool:
    """Whether the process that made the directory of this name runs (as far as this pid namespace can see)."""
    try:
        pid, started, _ = name.removeprefix(PREFIX).split("-")
        return start_time(int(pid)) == started
    except ValueError:
        return True  # not a name of ours


def sweep(parent: Path) -> list[str]:
    """Removes what engines that were killed left under `parent`: processes, cgroups, directories. Returns their names.

    Never touches what belongs to a living engine, to another user, or was not made by an engine.
    """
    removed: list[str] = []
    for path in sorted(parent.glob(f"{PREFIX}*")):
        if not owner_lives(path.name) and _is_ours(path):
            with _taken_over(path) as taken:
                if taken:
                    try:
                        _end_processes(path.name)
                        for group in _recorded_groups(path):
                            remove_groups(group)
                        unmount_below(path)
                        remove_tree(path)
                        removed.append(path.name)
                    except OSError as error:  # it must not keep this engine, and every later one, from opening
                        logger.warning("what the dead engine %s left cannot be removed now: %s", path, error)
    return removed


def _recorded_groups(path: Path) -> list[Path]:
    """The cgroups that a dead engine made, by the record it kept; a group of any other name is not believed."""
    try:
        lines = (path / _CGROUPS).read_text().splitlines()
    except OSError:
        return []
    return [Path(line) for line in lines if Path(line).name == path.name]


def _is_ours(path: Path) -> bool:
    info = path.lstat()
    users = {os.geteuid()} | ({SANDBOX_USER[0]} if os.geteuid() == 0 else set())
    return stat.S_ISDIR(info.st_mode) and info.st_uid in users


@contextlib.contextmanager
def _taken_over(path: Path) -> Iterator[bool]:
    """Holds the lock of a dead engine's directory, given its launcher's time to clean up; False: there is no need."""
    try:
        lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield False  # just removed by another sweep
        return
    deadline = time.monotonic() + _DYING_S
    try:
        while not _locked(lock_fd) and time.monotonic() < deadline:
            time.sleep(0.01)  # a lock has no wait with a deadline
        yield _locked(lock_fd) and path.exists()
    finally:
        os.close(lock_fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_processes(name: str) -> None:
    """Kills the processes that still stand on the directory `name` and waits until they are gone."""
    _kill_until_none(lambda: processes_on(name))


def kill_marked(mark: str) -> None:
    """Kills every process whose environment holds `mark`, until there is none. Blocks."""
    _kill_until_none(lambda: [pid for pid in _pids() if mark.encode() in _read(pid, "environ").split(b"\0")])


def _kill_until_none(find: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + _DYING_S
    while (pids := find()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)  # they are not our children: there is no wait for them


def processes_on(name: str) -> list[int]:
    """The processes of the engine whose directory has this name; not those that merely speak of it."""
    return [pid for pid in _pids() if pid != os.getpid() and _stands_on(pid, name)]


def _stands_on(pid: int, name: str) -> bool:
    words = _read(pid, "cmdline").decode("utf-8", "replace").split("\0")
    if words[0].endswith("/bwrap") and any(f"/{name}/" in word for word in words):
        return True
    if any(word.endswith("/launcher.py") for word in words[1:5]) and any(f'/{name}"' in word for word in words):
        return True
    environment = _read(pid, "environ").decode("utf-8", "replace").split("\0")
    if any(word.startswith(f"{ROOT_MARK}=") and f"/{name}/boxes/" in word for word in environment):
        return True  # of `unsafe-process`
    return shows_tools(Path(f"/proc/{pid}"), name)


def shows_tools(process: Path, name: str) -> bool:
    """Whether a part of the engine's tools is mounted where the process lives, as it is in every sandbox and nowhere
    else. The name alone is no proof: every process of the host sees the mounts that hold workspaces with a quota."""
    try:
        lines = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return False  # gone, or another user's
    return any(f"/{name}/tools/" in line.split()[3] for line in lines)


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""  # gone, or another user's
