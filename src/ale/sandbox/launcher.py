"""The launcher: a small process that starts, kills and buries the sandboxes of one engine. Standard library only.

The engine cannot do this well itself: `--die-with-parent` binds a sandbox to the *thread* that started it, a fork of a
process that holds a model is dear, and the engine may not give up its user while sandboxes must not run as root. So
the launcher gives up its user once, and starts everything with posix_spawn from its only thread. When the engine goes,
however it goes, the launcher kills every sandbox, waits until the kernel has taken the last process of each, removes
their cgroups and their files, and ends. Should it be killed too, the sandboxes die with it.

Messages are JSON, one per SOCK_SEQPACKET datagram.
Engine to launcher: {"spawn": id, "argv", "limits"}, with descriptors 0 to 2 and, for the gate, 5 as
                    ancillary data
                    {"kill": id}
Launcher to engine: {"ready": pid}
                    {"ended": id, "exit_code", "setup": whether the command was reached, "out_of_memory": whether that
                    is why}, or {"ended": id, "error": why it was not started}
A sandbox has ended when its last process is gone: bwrap's monitor is reaped and process 1 of the namespace is dead.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_MAX_MESSAGE = 1 << 20
_END_S = 30.0  # beyond this a process is stuck in the kernel, and the next start's sweep has to do
_FIRST_FREE_FD = 10  # below lie the descriptors that a sandbox starts with
SECCOMP_FD, STATUS_FD, GATE_FD = 3, 4, 5
_STDIO = (0, 1, 2, GATE_FD)  # where the descriptors of a spawn go
_KILLED = (-9, 128 + 9)  # of the monitor, of process 1
_OOM_SCORE_ADJ = "500"  # when the host runs out of memory a sandbox goes before the training run


class Job:
    """One sandbox: bwrap's monitor process, and process 1 of its namespaces once bwrap has named it."""

    def __init__(self, name: str, monitor: int, status_fd: int, cgroups: list[str]) -> None:
        self.name, self.monitor, self.cgroups = name, monitor, cgroups
        self.status_fd: int | None = status_fd
        self.status = bytearray()
        self.init_pidfd: int | None = None
        self.init_alive = True
        self.monitor_code: int | None = None
        self.killed = False

    def report(self) -> dict[str, Any]:
        """The JSON documents that bwrap has written so far, merged."""
        merged: dict[str, Any] = {}
        for line in self.status.splitlines():
            with contextlib.suppress(ValueError):  # the last line may be half there
                merged |= json.loads(line)
        return merged


class Launcher:
    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self.control = control
        self.directory = config["directory"]
        self.seccomp = config["seccomp"]
        self.cgroups = config["cgroups"]  # [{"directory", "limits": {name of the limit: file}, "door"}]
        self.jobs: dict[str, Job] = {}
        self.by_monitor: dict[int, Job] = {}
        self.by_fd: dict[int, Job] = {}
        self.poller = select.poll()
        self.wake, wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        self.engine_pidfd = os.pidfd_open(config["engine"])
        for fd in (control.fileno(), self.wake, self.engine_pidfd):
            self.poller.register(fd, select.POLLIN)

    def serve(self) -> None:
        while True:
            for fd, _ in self.poller.poll():
                if fd == self.engine_pidfd:
                    return
                if fd == self.control.fileno():
                    if not self.receive():
                        return
                elif fd == self.wake:
                    os.read(self.wake, 4096)
                elif fd in self.by_fd:
                    self.progress(fd)
            self.reap()

    def receive(self) -> bool:
        # Not socket.recv_fds: it loses the flag, and every sandbox would inherit these descriptors.
        try:
            data, ancillary, _, _ = self.control.recvmsg(
                _MAX_MESSAGE, socket.CMSG_SPACE(len(_STDIO) * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            return False  # the engine was killed before it had read all that it was told
        fds = [fd for _, _, packed in ancillary for fd in memoryview(packed).cast("i")]
        if not data:
            return False
        message = json.loads(data)
        if "spawn" in message:
            try:
                self.spawn(message, fds)
            except OSError as error:
                self.tell({"ended": message["spawn"], "error": f"cannot start bwrap: {error}"})
            finally:
                for fd in fds:
                    os.close(fd)
        elif message["kill"] in self.jobs:
            self.kill(self.jobs[message["kill"]])
        return True

    def tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the engine has gone; the main loop sees it too
            self.control.send(json.dumps(message).encode())

    def spawn(self, message: dict[str, Any], fds: list[int]) -> None:
        name = message["spawn"]
        status_out, status_in = os.pipe2(os.O_CLOEXEC)
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip(fds, _STDIO, strict=False)
        ]
        actions.append((os.POSIX_SPAWN_OPEN, SECCOMP_FD, self.seccomp, os.O_RDONLY, 0))
        actions.append((os.POSIX_SPAWN_DUP2, status_in, STATUS_FD))
        cgroups: list[str] = []
        argv = message["argv"]
        signals = (signal.SIGPIPE, signal.SIGXFSZ)
        hierarchies = [h for h in self.cgroups if h["limits"].keys() & message["limits"].keys()]
        try:
            try:
                self.enter_cgroups(hierarchies, name, message["limits"], cgroups)
                monitor = os.posix_spawn(argv[0], argv, {}, file_actions=actions, setsigdef=signals)
            finally:
                os.close(status_in)
                self.leave_cgroups(hierarchies)
        except OSError:
            os.close(status_out)
            remove_cgroups(cgroups)
            raise
        os.set_blocking(status_out, False)
        job = Job(name, monitor, status_out, cgroups)
        self.jobs[name] = self.by_monitor[monitor] = self.by_fd[status_out] = job
        self.poller.register(status_out, select.POLLIN)

    def enter_cgroups(
        self, hierarchies: list[dict[str, Any]], name: str, limits: dict[str, int | str], made: list[str]
    ) -> None:
        """Moves this process into new cgroups, so that what it starts next is born in them; lists them in `made`."""
        for hierarchy in hierarchies:
            directory = f"{hierarchy['directory']}/{name}"
            os.mkdir(directory)
            made.append(directory)
            for limit, file in hierarchy["limits"].items():
                if limit in limits:
                    write(f"{directory}/{file}", str(limits[limit]))
            write(f"{directory}/{hierarchy['door']}", "0")

    def leave_cgroups(self, hierarchies: list[dict[str, Any]]) -> None:
        for hierarchy in hierarchies:
            write(f"{hierarchy['directory']}/home/{hierarchy['door']}", "0")

    def progress(self, fd: int) -> None:
        job = self.by_fd[fd]
        if fd == job.init_pidfd:
            job.init_alive = False
            self.forget_fd(fd)
            self.settle(job)
            return
        self.read_status(job)

    def read_status(self, job: Job) -> None:
        if job.status_fd is None:
            return
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(job.status_fd, 4096):
                job.status += data
            ended = True
        init = job.report().get("child-pid")
        if init is not None and job.init_pidfd is None and job.init_alive:
            try:
                job.init_pidfd = os.pidfd_open(init)
            except ProcessLookupError:
                job.init_alive = False
            else:
                self.by_fd[job.init_pidfd] = job
                self.poller.register(job.init_pidfd, select.POLLIN)
                if job.killed:
                    self.kill(job)
        if ended:
            self.forget_fd(job.status_fd)
            job.status_fd = None

    def forget_fd(self, fd: int) -> None:
        self.poller.unregister(fd)
        del self.by_fd[fd]
        os.close(fd)

    def kill(self, job: Job) -> None:
        """Kills process 1 of the namespaces, and the kernel kills the rest; as soon as bwrap has named it.

        Never the monitor: killed too early it leaves a child behind that waits for it forever.
        """
        job.killed = True
        if job.init_pidfd is not None and job.init_alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(job.init_pidfd, signal.SIGKILL)

    def reap(self) -> None:
        for job in list(self.jobs.values()):
            if job.init_pidfd is None:
                self.read_status(job)  # before its pid can be given to another process
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.by_monitor:  # else process 1 of a sandbox whose monitor went first
                job = self.by_monitor.pop(pid)
                job.monitor_code = os.waitstatus_to_exitcode(status)
                self.settle(job)

    def settle(self, job: Job) -> None:
        if job.monitor_code is None:
            return
        self.read_status(job)
        if job.init_pidfd is None:
            job.init_alive = False  # bwrap failed before it made the namespaces
        if job.init_alive:
            return
        report = job.report()
        if job.status_fd is not None:
            self.forget_fd(job.status_fd)
        del self.jobs[job.name]
        exit_code = report.get("exit-code", job.monitor_code)
        self.tell(
            {
                "ended": job.name,
                "exit_code": exit_code,
                "setup": "exit-code" in report or job.killed,
                "out_of_memory": not job.killed and exit_code in _KILLED and out_of_memory(job.cgroups),
            }
        )
        remove_cgroups(job.cgroups)

    def end(self) -> None:
        """Kills every sandbox, waits for the last process of each, and removes their files.

        The directory itself, its lock and cgroups take the engine's rights: `state.sweep` removes them.
        """
        self.poller.unregister(self.control.fileno())
        self.poller.unregister(self.engine_pidfd)
        for job in self.jobs.values():
            self.kill(job)
        deadline = time.monotonic() + _END_S
        while self.jobs and time.monotonic() < deadline:
            for fd, _ in self.poller.poll(1000):
                if fd == self.wake:
                    os.read(self.wake, 4096)
                elif fd in self.by_fd:
                    self.progress(fd)
            self.reap()
        for pid in children():  # of a monitor that somebody else killed too early
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for name in ("boxes", "layers", "tools"):
            with contextlib.suppress(OSError):  # mounts with a quota take root's rights: `state.sweep` again
                remove_tree(os.path.join(self.directory, name))


def children() -> list[int]:
    """The living children of this process, adopted ones included."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[1] == str(os.getpid()):
                    found.append(int(name))
    return found


def write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def out_of_memory(directories: Iterable[str]) -> bool:
    """Whether the kernel killed a process for memory in one of these groups."""
    for directory in directories:
        for file in ("memory.oom_control", "memory.events"):  # v1, v2
            with contextlib.suppress(OSError), open(f"{directory}/{file}") as lines:
                if any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in lines):
                    return True
    return False


def remove_cgroups(directories: Iterable[str]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # the sweep of the next engine start removes it
            os.rmdir(directory)


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Removes a tree that no process uses any more, however deep it is and whatever modes a sandbox left in it.

    What a directory holds is moved to the top before it is removed, so that the depth of a tree that was made to be
    deep costs neither stack nor descriptors, and no path grows longer than the kernel takes.
    """
    os.chmod(path, 0o700)
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    prefix = os.urandom(8).hex()  # no name in the tree
    try:
        moved = 0
        directories = remove_files(top)
        while directories:
            name = directories.pop()
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                for child in remove_files(folder):
                    moved += 1
                    os.rename(child, f"{prefix}{moved:x}", src_dir_fd=folder, dst_dir_fd=top)
                    directories.append(f"{prefix}{moved:x}")
            finally:
                os.close(folder)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)


def remove_files(folder: int) -> list[str]:
    """Removes what is not a directory; the directories, which it makes accessible, are returned."""
    directories: list[str] = []
    for name in os.listdir(folder):
        try:
            os.unlink(name, dir_fd=folder)
        except IsADirectoryError:
            os.chmod(name, 0o700, dir_fd=folder)
            directories.append(name)
    return directories


def main() -> None:
    config = json.loads(sys.argv[1])
    for fd in config["keep"]:
        os.set_inheritable(fd, False)  # the engine's lock, held until this process has ended too
    while (null := os.open("/dev/null", os.O_RDWR)) < _FIRST_FREE_FD:
        pass
    control = socket.socket(fileno=os.dup(0))
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.umask(0o022)  # what commands are born with
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    write("/proc/self/oom_score_adj", _OOM_SCORE_ADJ)
    try:
        launcher = Launcher(control, config)
    except ProcessLookupError:  # the engine was killed meanwhile: what it has made is for the next sweep
        sys.exit(1)
    launcher.leave_cgroups(launcher.cgroups)  # as the engine's user: entering `home` from outside needs its rights
    if config["user"] is not None:
        uid, gid = config["user"]
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    launcher.tell({"ready": os.getpid()})
    try:
        launcher.serve()
    finally:
        launcher.end()


if __name__ == "__main__":
    main()
