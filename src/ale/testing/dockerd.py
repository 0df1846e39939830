"""A Docker engine of one's own, for tests and benchmarks: nothing of it outside a directory, and nothing left after it.

    with own_dockerd() as dockerd:
        async with open_docker(host=dockerd.host, image=...) as engine: ...

The binaries are those of the machine, else those of Debian's packages, which are unpacked and not installed. It runs
without a network of its own: it makes no bridge and leaves the firewall alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGES = ("docker.io", "containerd", "runc", "libdevmapper1.02.1", "libseccomp2", "busybox-static")
_CONTAINERD, _SHIM = b"containerd", b"containerd-shim-runc-v2"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_FETCH_S, _START_S, _STOP_S, _POLL_S = 300.0, 60.0, 30.0, 0.05

# What the tests' commands are made of, where the machine has it.
_PROGRAMS = (
    "bash sh [ basename cat chgrp chmod chown cp cut date dd df dirname du echo env expr false fallocate find flock "
    "getconf grep head hostname id install kill ln ls md5sum mkdir mkfifo mknod mktemp mount mv nice nohup nproc od "
    "paste printf printenv ps pwd readlink realpath rm rmdir sed seq setsid sha256sum sleep sort split stat stty su "
    "sum sync tail tar tee test timeout touch tr true truncate tty umount uname uniq unshare wc whoami xargs yes "
)


class Unavailable(Exception):
    """There can be none here; says why."""


def binaries(folder: Path) -> dict[str, str]:
    """The environment in which `dockerd` and what it needs are found; fetched to `folder` if the machine has none."""
    if shutil.which("dockerd", path=_SYSTEM_PATH) and shutil.which("runc", path=_SYSTEM_PATH):
        return {"PATH": _SYSTEM_PATH}
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("there is no dockerd, and no apt-get and dpkg-deb to fetch it with")
    folder.mkdir(parents=True)
    try:
        try:
            _apt("download", folder)
        except subprocess.CalledProcessError:
            _apt("update", folder)
            _apt("download", folder)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True, timeout=_FETCH_S)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or b""
        raise Unavailable(f"the packages of Docker cannot be fetched: {error} {said.decode()[-300:]}") from error
    libraries = ":".join(sorted({str(path.parent) for path in folder.rglob("*.so.*")}))
    path = ":".join(str(folder / name) for name in ("usr/sbin", "usr/bin", "sbin", "bin"))
    return {"PATH": f"{path}:{_SYSTEM_PATH}", "LD_LIBRARY_PATH": libraries}


def _apt(what: str, folder: Path) -> None:
    packages = _PACKAGES if what == "download" else ()
    command = ["apt-get", "-qq", what, *packages]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_FETCH_S)


class Dockerd:
    """A running daemon. `kill` and `start` are for tests of what its end does to others."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.socket = folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers. Raises Unavailable with the end of its log when it does not."""
        if not self.helpers(_CONTAINERD):  # one that is dead and not reaped yet would be taken for a living one
            (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)
        (self.folder / "pid").unlink(missing_ok=True)
        arguments: list[str | Path] = [
            *("dockerd", "--host", self.host, "--data-root", self.folder / "data", "--exec-root", self.folder / "exec"),
            *("--pidfile", self.folder / "pid", "--bridge", "none", "--iptables=false"),
        ]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = (self.folder / "log").read_text(errors="replace")[-1500:]
                raise Unavailable(f"dockerd does not start here: {tail}")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.connect(str(self.socket))
            connection.sendall(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(1000)
        return False

    def program(self, name: str) -> str | None:
        """The path of a program that came with it, or that the machine has."""
        return shutil.which(name, path=self._environment["PATH"])

    def kill(self) -> None:
        """SIGKILL to the daemon, which takes containerd with it. The containers go on without them."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + _STOP_S
        while self.helpers(_CONTAINERD) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ends the daemon, and whatever of its containers and helpers is left."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid in [*self.helpers(), *self.contained()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def helpers(self, *names: bytes) -> list[int]:
        """Of these names; without any: containerd, and a shim for each container that runs. All name its directory."""
        mark = f"{self.folder}/".encode()
        found = []
        for pid, entry in _processes():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                helper = words[0].rsplit(b"/", 1)[-1]
                if helper in (names or (_CONTAINERD, _SHIM)) and any(mark in word for word in words):
                    found.append(pid)
        return found

    def contained(self) -> list[int]:
        """The programs in its containers: what they stand on lies in its directory. Not a `runc init` that never became
        one, and waits for a daemon that was killed meanwhile."""
        found = []
        for pid, entry in _processes():
            with contextlib.suppress(OSError):
                mounts = (line.split() for line in (entry / "mountinfo").read_text().splitlines())
                begun = (entry / "cmdline").read_bytes() != b"runc\0init\0"
                if begun and any(mount[4] == "/" and f"{self.folder}/" in mount[-1] for mount in mounts):
                    found.append(pid)
        return found


def _processes() -> Iterator[tuple[int, Path]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name), entry


@contextmanager
def own_dockerd(*, data_bytes: int | None = None) -> Iterator[Dockerd]:
    """Starts a daemon whose data, socket and helpers stand in a directory, and removes it all. Raises Unavailable.

    `data_bytes`: its data lie on a file system of their own of this size, in memory; None: where the directory is.
    """
    if os.geteuid() != 0:
        raise Unavailable("a Docker engine of one's own needs root")
    folder = Path(tempfile.mkdtemp(prefix="ale-dockerd-"))  # short: containerd's socket lies deep in it
    try:
        if data_bytes is not None:
            (folder / "data").mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={data_bytes}", "ale-dockerd", str(folder / "data")]
            if subprocess.run(mount, check=False, capture_output=True, timeout=_STOP_S).returncode != 0:
                raise Unavailable("this user may not mount a file system of a given size")
        dockerd = Dockerd(folder, binaries(folder / "packages"))
        try:
            dockerd.start()
            yield dockerd
        finally:
            dockerd.stop()
    finally:
        _unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _unmount_below(folder: Path) -> None:
    """What a daemon that was killed left mounted, the deepest first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True, timeout=_STOP_S)


def make_rootfs(folder: Path) -> Path:
    """A root file system of this machine's own bash and basic programs with their libraries; no Python in it."""
    folder.mkdir(parents=True)
    for name in ("bin", "etc", "lib", "lib64", "proc", "sys", "dev", "usr/bin", "usr/lib"):
        (folder / name).mkdir(parents=True)
    (folder / "tmp").mkdir(mode=0o777)
    (folder / "tmp").chmod(0o1777)
    (folder / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    libraries: set[str] = set()
    for program in _PROGRAMS.split():
        found = shutil.which(program, path=_SYSTEM_PATH)
        if found is None:
            continue
        shutil.copy(found, folder / "usr/bin" / program)
        (folder / "bin" / program).symlink_to(f"../usr/bin/{program}")
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=False, timeout=_STOP_S).stdout
        libraries.update(word for word in listed.split() if word.startswith("/"))
    for library in libraries:
        target = folder / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    return folder
