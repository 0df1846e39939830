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
    door: str
    """The file of a group through which a process with one thread enters it."""


class Cgroups(msgspec.Struct, frozen=True):
    """`enforces` says by which means memory and pids are limited; a name that is missing cannot be."""

    hierarchies: tuple[Hierarchy, ...] = ()
    enforces: dict[str, str] = {}

    def refused_forks(self, group: str) -> int:
        """How often `pids.max` refused a process in a group; 0 where the kernel does not count."""
        for hierarchy in self.hierarchies:
            if "pids" in hierarchy.limits:
                try:  # twice for every command: not by Path and a text file, which take four times as long
                    fd = os.open(f"{hierarchy.directory}/{group}/pids.events", os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    return 0
                try:
                    words = os.read(fd, 4096).split()
                finally:
                    os.close(fd)
                return int(words[words.index(b"max") + 1]) if b"max" in words else 0
        return 0

    def remove(self) -> None:
        for hierarchy in self.hierarchies:
            remove_groups(Path(hierarchy.directory))


_CPU_PERIOD_US = 100_000  # the kernel's default
_CONTROLLERS = ("memory", "pids", "cpu")


def limit_values(memory_bytes: int, pids: int, cpus: float | None) -> dict[str, int | str]:
    """The value of every limit that a `Hierarchy` may name; those of a controller that is not wanted are left out."""
    values: dict[str, int | str] = {
        "memory": memory_bytes, "memory and swap": memory_bytes, "swap": 0, "pids": pids,
    }  # fmt: skip
    if cpus is not None:
        quota_us = max(1000, round(cpus * _CPU_PERIOD_US))  # the least that the kernel takes
        values |= {"cpu": f"{quota_us} {_CPU_PERIOD_US}", "cpu period": _CPU_PERIOD_US, "cpu quota": quota_us}
    return values


class Parents(msgspec.Struct, frozen=True):
    """Directories under which groups may be made, the best first."""

    v2: tuple[Path, ...] = ()
    memory_v1: tuple[Path, ...] = ()
    pids_v1: tuple[Path, ...] = ()
    cpu_v1: tuple[Path, ...] = ()

    def directories(self, name: str) -> list[str]:
        """Every directory that `make_cgroups(name)` may make."""
        return [str(parent / name) for parent in (*self.v2, *self.v1())]

    def v1(self) -> dict[Path, tuple[str, ...]]:
        """The controllers of each v1 directory: several may be mounted together."""
        together: dict[Path, tuple[str, ...]] = {}
        for controller, parents in zip(_CONTROLLERS, (self.memory_v1, self.pids_v1, self.cpu_v1), strict=True):
            for parent in parents:
                together[parent] = (*together.get(parent, ()), controller)
        return together


def make_cgroups(name: str, owner: tuple[int, int] | None, parents: Parents) -> Cgroups:
    """Makes the engine's directories under the groups this process is in; what fails is left out."""
    hierarchies: list[Hierarchy] = []
    enforces: dict[str, str] = {}
    v2 = [("v2", parent, controllers) for controllers in (_CONTROLLERS, _CONTROLLERS[:2]) for parent in parents.v2]
    v1 = [("v1", parent, controllers) for parent, controllers in parents.v1().items()]
    for version, parent, controllers in (*v2, *v1):
        if version == "v2" and enforces:
            continue
        missing = tuple(controller for controller in controllers if controller not in enforces)
        made = _make(parent, name, owner, missing, v2=version == "v2") if missing else None
        if made is not None:
            hierarchies.append(made)
            enforces |= dict.fromkeys(missing, f"cgroup {version}")
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
            if key in own and key in ("", *_CONTROLLERS):
                inside = os.path.relpath(own[key], root)
                group = Path(point) / ("" if inside.startswith("..") else inside)
                # v2 forbids groups beside processes everywhere but at the root: try upwards from here.
                above = [parent for parent in group.parents if parent.is_relative_to(point)] if key == "" else []
                found[key] = (group, *above)
    return Parents(found.get("", ()), *(found.get(controller, ()) for controller in _CONTROLLERS))


def _make(
    parent: Path, name: str, owner: tuple[int, int] | None, controllers: tuple[str, ...], v2: bool
) -> Hierarchy | None:
    directory = parent / name
    # Moving a process halts every fork and exit of the machine, for which the kernel waits 5 to 16 ms; moving a thread,
    # which only v1 lets us do, takes 0.04 ms.
    door = "cgroup.procs" if v2 else "tasks"
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
            if "cpu" in controllers:
                limits["cpu"] = "cpu.max"
        else:
            directory.mkdir()
            if "memory" in controllers:
                limits |= {"memory": "memory.limit_in_bytes", "memory and swap": "memory.memsw.limit_in_bytes"}
            if "cpu" in controllers:
                limits |= {"cpu period": "cpu.cfs_period_us", "cpu quota": "cpu.cfs_quota_us"}
        home = directory / "home"
        home.mkdir()
        limits = {limit: file for limit, file in limits.items() if (home / file).exists()}
        if not set(controllers) <= {limit.split()[0] for limit in limits}:
            raise OSError(f"{home} lacks {controllers}")
        for limit, file in limits.items():  # the proof that limits can be set here
            (home / file).write_text(str(limit_values(1 << 30, 1024, 1024.0)[limit]))
        if owner is not None:
            for path in (directory, directory / door, home, home / door):
                os.chown(path, *owner)
    except OSError:
        remove_groups(directory)
        return None
    return Hierarchy(str(directory), limits, door)


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
