"""Quotas: a workspace on a file system of its own, a tmpfs of a given size and number of files, where one may mount.

A tmpfs is the one writable file system that can be made in a fraction of a millisecond with both limits. It is mounted
on the host, because a snapshot of the workspace outlives the sandbox's namespaces. Project quotas would serve on disk,
but need a file system that was mounted for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MNT_DETACH = 2, 4, 4096, 2


def _call(name: str, *arguments: bytes | int | None) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(arguments[1] if name == "mount" else arguments[0]))  # type: ignore[arg-type]


def mount_tmpfs(path: Path, size_bytes: int, inodes: int, owner: tuple[int, int] | None) -> None:
    """Covers a directory by an empty file system. 0: no limit of its own."""
    uid, gid = owner or (os.geteuid(), os.getegid())
    options = f"size={size_bytes},nr_inodes={inodes},mode=0700,uid={uid},gid={gid}"
    _call("mount", b"ale-quota", os.fsencode(path), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())


def bind(source: Path, target: Path) -> None:
    _call("mount", os.fsencode(source), os.fsencode(target), b"", _MS_BIND, None)


def unmount(path: Path) -> None:
    """Detaches a mount; its content goes when the last user has gone."""
    _call("umount2", os.fsencode(path), _MNT_DETACH)


def unmount_below(directory: Path) -> None:
    """Detaches every mount below a directory, the innermost first; one that this user may not detach stays."""
    prefix = f"{directory}/"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for point in reversed([point for point in points if point.startswith(prefix)]):
        with contextlib.suppress(OSError):
            unmount(Path(point))


def can_mount(directory: Path) -> bool:
    """Found out by mounting in `directory`, which is empty."""
    try:
        mount_tmpfs(directory, 4096, 2, None)
        unmount(directory)
    except OSError:
        return False
    return True
