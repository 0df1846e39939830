"""How a spec's limits are enforced on this machine: by cgroups where they can be made, else by resource limits."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import msgspec

from ale.errors import SandboxUnavailable
from ale.sandbox.cgroup import Cgroups, limit_values
from ale.sandbox.port import Limits

_MB = 1024 * 1024
_OPEN_FILES = 1024
# bwrap's monitor and process 1, which share a sandbox's cgroup with the commands.
_OWN_PROCESSES = 2


class Enforcement(msgspec.Struct, frozen=True):
    cgroups: Cgroups
    mounts: bool = False
    """Whether a workspace can get a file system of its own, with a quota."""

    def check(self, limits: Limits) -> None:
        """Refuses a limit that was asked for and cannot be enforced here."""
        if limits.cpus is not None and "cpu" not in self.cgroups.enforces:
            raise SandboxUnavailable(
                f"Limits.cpus: {limits.cpus:g} cannot be enforced here: no cgroup with the cpu controller can be made. "
                "Leave it None, run as root, or delegate the controller to this user (systemd: `Delegate=cpu`)."
            )
        if (limits.disk_mb is not None or limits.inodes is not None) and not self.mounts:
            raise SandboxUnavailable(
                "Limits.disk_mb and Limits.inodes cannot be enforced here: this user may not mount a tmpfs. Leave them "
                "None, or run as root with CAP_SYS_ADMIN; without them `memory_mb` bounds what is written where the "
                "engine's directory is in memory."
            )

    def group_limits(self, limits: Limits) -> dict[str, int | str]:
        return limit_values(limits.memory_mb * _MB, limits.pids + _OWN_PROCESSES, limits.cpus)

    def resource_limits(self, limits: Limits) -> dict[int, int]:
        """Resource limits of every process in a sandbox; never above what the engine itself has."""
        wanted = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: limits.file_mb * _MB,
            resource.RLIMIT_NOFILE: _OPEN_FILES,
        }
        if "pids" not in self.cgroups.enforces:
            wanted[resource.RLIMIT_NPROC] = limits.pids + _OWN_PROCESSES
        if "memory" not in self.cgroups.enforces:
            wanted[resource.RLIMIT_AS] = limits.memory_mb * _MB
        return {number: _lowered(number, value) for number, value in wanted.items()}

    def capabilities(self, in_memory: bool) -> Mapping[str, str]:
        """`in_memory`: whether workspaces lie in memory, which a memory cgroup then bounds."""
        enforces = self.cgroups.enforces
        bounded = in_memory and "memory" in enforces
        return {
            "memory": enforces.get("memory", "prlimit, each process by itself"),
            "pids": enforces.get("pids", "prlimit"),
            "file size": "prlimit",
            "cpu time": "prlimit, each process by itself",
            "cpu share": enforces.get("cpu", "no: no cgroup with the cpu controller can be made"),
            "disk": "the memory limit" if bounded else "no: only /tmp and single files are bounded",
            "disk quota": "tmpfs" if self.mounts else "no: this user may not mount",
        }


def _lowered(number: int, value: int) -> int:
    hard = resource.getrlimit(number)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)
