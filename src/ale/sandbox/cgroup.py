"""Control groups: where this process may make them (v1 or v2), found out by making one.

The engine gets a directory of its own per hierarchy, handed to the sandboxes' user, in which the launcher makes one
group per sandbox. `home` is where the launcher itself lives.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

_EMPTY_S = 2.0  # how long the processes of a dead engine may take to leave their groups


class Hierarchy(msgspec.Struct, frozen=True):
    """The engine's directory in one hierarchy, and the file that takes each limit in a sandbox's group."""

    directory: str
    limits: dict[str, str]


class Cgroups(msgspec.Struct, frozen=True):
    """`enforces` says by which means memory and pids are limited; a name that is missing cannot be."""

    hierarchies: tuple[Hierarchy, ...] = ()
    enforces: dict[str, str] = {}

    def remove(self) -> None:
        for hierarchy in self.hierarchies:
            remove_groups(Path(hierarchy.directory))


def limit_values(memory_bytes: int, pids: int) -> dict[str, int]:
    """The value of every limit that a `Hierarchy` may name."""
    return {"memory": memory_bytes, "memory and swap": memory_bytes, "swap": 0, "pids": pids}


class Parents(msgspec.Struct, frozen=True):
    """Directories under which groups may be made, the best first."""

    v2: tuple[Path, ...] = ()
    memory_v1: tuple[Path, ...] = ()
    pids_v1: tuple[Path, ...] = ()

    def directories(self, name: str) -> list[str]:
        """Every directory that `make_cgroups(name)` may make."""
        return [str(parent / name) for parent in (*self.v2, *self.memory_v1, *self.pids_v1)]


def make_cgroups(name: str, owner: tuple[int, int] | None, parents: Parents) -> Cgroups:
    """Makes the engine's directories under the groups this process is in; what fails is left out."""
    hierarchies: list[Hierarchy] = []
    enforces: dict[str, str] = {}
    for version, controllers, candidates in (
        ("v2", ("memory", "pids"), parents.v2),
        ("v1", ("memory",), parents.memory_v1),
        ("v1", ("pids",), parents.pids_v1),
    ):
        for parent in candidates:
            if set(controllers) <= set(enforces):
                break
            made = _make(parent, name, owner, controllers, v2=version == "v2")
            if made is not None:
                hierarchies.append(made)
                enforces |= dict.fromkeys(controllers, f"cgroup {version}")
    return Cgroups(tuple(hierarchies), enforces)


def find_parents(proc: Path = Path("/proc/self")) -> Parents:
    own: dict[str, str] = {}  # controller ("" for v2) -> path of this process's group
    try:
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path)
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return Parents()
    found: dict[str, tuple[Path, ...]] = {}
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        keys = [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []
        for key in keys:
            if key in own and key in ("", "memory", "pids"):
                inside = os.path.relpath(own[key], root)
                group = Path(point) / ("" if inside.startswith("..") else inside)
                # v2 forbids groups beside processes everywhere but at the root: try upwards from here.
                above = [parent for parent in group.parents if parent.is_relative_to(point)] if key == "" else []
                found[key] = (group, *above)
    return Parents(found.get("", ()), found.get("memory", ()), found.get("pids", ()))


def _make(
    parent: Path, name: str, owner: tuple[int, int] | None, controllers: tuple[str, ...], v2: bool
) -> Hierarchy | None:
    directory = parent / name
    limits = {"pids": "pids.max"} if "pids" in controllers else {}
    try:
        if v2:
            if not set(controllers) <= set((parent / "cgroup.controllers").read_text().split()):
                return None
            wanted = " ".join(f"+{controller}" for controller in controllers)
            if not set(controllers) <= set((parent / "cgroup.subtree_control").read_text().split()):
                (parent / "cgroup.subtree_control").write_text(wanted)
            directory.mkdir()
            (directory / "cgroup.subtree_control").write_text(wanted)
            limits |= {"memory": "memory.max", "swap": "memory.swap.max"}
        else:
            directory.mkdir()
            if "memory" in controllers:
                limits |= {"memory": "memory.limit_in_bytes", "memory and swap": "memory.memsw.limit_in_bytes"}
        home = directory / "home"
        home.mkdir()
        limits = {limit: file for limit, file in limits.items() if (home / file).exists()}
        if not set(controllers) <= set(limits):
            raise OSError(f"{home} lacks {controllers}")
        for limit, file in limits.items():  # the proof that limits can be set here
            (home / file).write_text(str(limit_values(1 << 30, 1024)[limit]))
        if owner is not None:
            for path in (directory, directory / "cgroup.procs", home, home / "cgroup.procs"):
                os.chown(path, *owner)
    except OSError:
        remove_groups(directory)
        return None
    return Hierarchy(str(directory), limits)


def remove_groups(directory: Path) -> bool:
    """Removes an engine's directory once the processes in it have gone; False when they will not go."""
    deadline = time.monotonic() + _EMPTY_S
    while directory.exists():
        try:
            for folder in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
                folder.rmdir()
            directory.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)  # the kernel offers no wait for an empty v1 group
    return True
