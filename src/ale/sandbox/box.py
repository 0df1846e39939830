"""The box of a sandbox: the host directory that takes what it writes to its workspace, with or without a quota."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ale.sandbox.launcher import remove_tree
from ale.sandbox.port import Limits
from ale.sandbox.quota import mount_tmpfs, unmount

_MB = 1024 * 1024
_OWN_INODES = 4  # the box itself, `upper`, `work`, and the directory that overlayfs makes in `work`


class Box:
    """An upper directory, and overlayfs's work directory beside it."""

    def __init__(self, path: Path, owner: tuple[int, int] | None, limits: Limits) -> None:
        self.path, self.upper, self.work = path, path / "upper", path / "work"
        self.mounted = False
        path.mkdir()
        try:
            if limits.disk_mb is not None or limits.inodes is not None:
                inodes = limits.inodes + _OWN_INODES if limits.inodes is not None else 0
                mount_tmpfs(path, (limits.disk_mb or 0) * _MB, inodes, owner)
                self.mounted = True
            for folder in (self.upper, self.work):
                folder.mkdir()
            if owner is not None:
                for folder in (path, self.upper, self.work):
                    os.chown(folder, *owner)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Blocks for as long as its files take to go."""
        if self.mounted:
            with contextlib.suppress(FileNotFoundError):
                unmount(self.path)
            self.mounted = False
        remove_tree(self.path)
