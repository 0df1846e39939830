"""The part of a Dockerfile that says which files the agent starts with: FROM, WORKDIR and plain COPY.

The base image is not looked at: tasks of this kind run on the machine's own userland, read-only. Whatever else an
image would need to be built for is refused, never skipped.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import msgspec

from ale.errors import TaskFormatError


class Copy(msgspec.Struct, frozen=True):
    """`COPY a.txt b/ data/` in /app is `Copy(sources=("a.txt", "b"), target="data", into=True)`.

    Sources are relative to the Dockerfile, `target` to the working directory ("." is itself). A source that is a
    directory is copied as its content. `into`: a source that is a file keeps its name under `target`.
    """

    sources: tuple[str, ...]
    target: str
    into: bool


def copies(text: str, *, where: Path, workdir: str) -> list[Copy]:
    """The COPY instructions in order; raises `TaskFormatError` for anything that only a container runtime can do."""
    found: list[Copy] = []
    stages = 0
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        keyword, *words = line.split()
        match keyword.upper(), words:
            case "FROM", [_, *_] if not stages:
                stages += 1
            case "WORKDIR", [path] if posixpath.normpath(path) == workdir:
                pass
            case "COPY", [_, *_, _] if not re.search(r"[][*?$\"'{}]|^COPY\s+--|<<", line, re.IGNORECASE):
                found.append(_copy(words, line, where, workdir))
            case _:
                raise _needs_docker(where, line, f"FROM, WORKDIR {workdir} and COPY of plain paths are understood")
    return found


def _copy(words: list[str], line: str, where: Path, workdir: str) -> Copy:
    *sources, target = words
    names = tuple(posixpath.normpath(source.lstrip("/")) for source in sources)
    if any(name.split("/")[0] == ".." for name in names):
        raise TaskFormatError(f"{where}: {line!r} copies from outside the environment directory; move it in.")
    absolute = posixpath.normpath(posixpath.join(workdir, target))
    relative = posixpath.relpath(absolute, workdir)
    if relative.split("/")[0] == "..":
        raise _needs_docker(where, line, f"files are copied below {workdir} only")
    return Copy(names, relative, into=target.endswith(("/", "/.")) or relative == "." or len(names) > 1)


def _needs_docker(where: Path, line: str, understood: str) -> TaskFormatError:
    return TaskFormatError(
        f"{where}: {line!r} needs the Docker backend; here {understood}. Put what the agent starts with into "
        "environment/files/ and remove the Dockerfile, or keep the task for Docker."
    )
