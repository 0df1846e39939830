"""Flattening: the upper directories of a chain of snapshots, merged into one that shows the same.

Files are hard-linked where one file
system holds the chain: no layer is ever written to. The rules are overlayfs's own (kernel documentation,
Documentation/filesystems/overlayfs.rst, with `userxattr`): a device 0:0 is a whiteout, a directory marked opaque hides
what is below it. Both are kept, for there may be layers below the chain.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from ale.sandbox.launcher import remove_tree

_OPAQUE, _PRIVATE = "user.overlay.opaque", "user.overlay."


def flatten(layers: Sequence[Path], target: Path) -> None:
    """Makes `target` of `layers`, the lowest first. Blocks. Raises OSError."""
    target.mkdir(0o700)
    directories: dict[Path, os.stat_result] = {target: layers[0].stat()}
    for layer in layers:
        directories[target] = layer.stat()
        _lay_over(layer, target, directories)
    for path, info in reversed(directories.items()):  # at the end: a mode may keep its own owner out
        if path.is_dir() and not path.is_symlink():
            _settle(path, info)


def _lay_over(source: Path, target: Path, directories: dict[Path, os.stat_result]) -> None:
    todo = [(source, target)]
    while todo:
        above, below = todo.pop()
        for name in _names(above):
            path, place = above / name, below / name
            info, there = path.lstat(), _lstat(place)
            if not stat.S_ISDIR(info.st_mode):
                if there is not None:
                    _remove(place, there)
                _bring(path, place, info)
                continue
            opaque = _OPAQUE in os.listxattr(path)
            if there is not None and (opaque or not stat.S_ISDIR(there.st_mode)):
                _remove(place, there)
                opaque, there = True, None
            if there is None:
                place.mkdir(0o700)
            if opaque:
                os.setxattr(place, _OPAQUE, b"y")
            for attribute in os.listxattr(path):
                if not attribute.startswith(_PRIVATE):
                    os.setxattr(place, attribute, os.getxattr(path, attribute))
            directories.pop(place, None)  # so that parents come before what is in them
            directories[place] = info
            todo.append((path, place))


def _bring(path: Path, place: Path, info: os.stat_result) -> None:
    """A link, or across file systems (a workspace with a quota has its own) a copy."""
    try:
        os.link(path, place, follow_symlinks=False)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    if stat.S_ISLNK(info.st_mode):
        place.symlink_to(os.readlink(path))
    elif stat.S_ISREG(info.st_mode):
        shutil.copyfile(path, place)
    else:  # a whiteout, or a pipe or socket of the sandbox
        os.mknod(place, info.st_mode, info.st_rdev)
    if os.geteuid() == 0:
        os.chown(place, info.st_uid, info.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        place.chmod(stat.S_IMODE(info.st_mode))
    os.utime(place, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except PermissionError:  # a sandbox may lock its own directories
        mode = stat.S_IMODE(directory.stat().st_mode)
        directory.chmod(0o700)
        try:
            return os.listdir(directory)
        finally:
            directory.chmod(mode)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _remove(path: Path, info: os.stat_result) -> None:
    if stat.S_ISDIR(info.st_mode):
        remove_tree(path)
    else:
        path.unlink()


def _settle(path: Path, info: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(path, info.st_uid, info.st_gid)
    path.chmod(stat.S_IMODE(info.st_mode))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
