"""One-shot runs: a command as the only process tree of a sandbox, without a rocklet; what grading uses."""

from __future__ import annotations

import asyncio
import os
import resource
import shlex
import time
from collections.abc import Mapping, Sequence
from signal import SIGKILL
from typing import BinaryIO

from ale.errors import SandboxError
from ale.sandbox.capture import Capture
from ale.sandbox.launcher_client import LauncherClient
from ale.sandbox.port import Command, Completed
from ale.sandbox.shielded import shielded

_LAST_SIGNAL = 64


async def run_once(
    client: LauncherClient, name: str, argv: Sequence[str], limits: Mapping[str, int | str], command: Command, keep: int
) -> Completed:
    """Runs bwrap's `argv` until its last process is gone, or kills it at the command's time-out.

    Raises SandboxError when the command was not reached. `keep`: bytes of each stream.
    """
    started = time.monotonic()
    with Capture(keep) as out, Capture(keep) as err, open_stdin(command.stdin) as stdin:
        stdio = (stdin.fileno(), out.inlet, err.inlet)
        launched = await client.spawn(name, argv, stdio=stdio, limits=limits)
        out.close_inlet()
        err.close_inlet()
        timed_out = False
        try:
            await asyncio.wait([launched.ended], timeout=command.timeout_s)
            timed_out = not launched.ended.done()
        finally:
            ended = await shielded(launched.kill())  # returns at once when it has ended by itself
        took_s = time.monotonic() - started
        (stdout, stdout_dropped), (stderr, stderr_dropped) = out.finish(), err.finish()
    if not ended.setup and not timed_out and not ended.out_of_memory:
        said = stderr.decode("utf-8", "replace").strip()
        raise SandboxError(f"a one-shot sandbox did not start: {said or f'bwrap ended with {ended.exit_code}'}")
    signal = None
    if timed_out or ended.out_of_memory:
        signal = int(SIGKILL)
    elif 128 < ended.exit_code <= 128 + _LAST_SIGNAL:
        signal = ended.exit_code - 128
    return Completed(
        exit_code=ended.exit_code if signal is None else None,
        signal=signal,
        stdout=stdout,
        stderr=stderr,
        stdout_dropped=stdout_dropped,
        stderr_dropped=stderr_dropped,
        timed_out=timed_out,
        duration_s=took_s,
    )


def become(
    shell: str, command: Command, directory: str | None, limits: Mapping[int, int], cpu_s: float | None
) -> tuple[str, ...]:
    """A shell that lowers its limits, enters the directory and becomes the command."""
    bash = shell.endswith("bash")
    settings = {"-c": limits[resource.RLIMIT_CORE], "-n": limits[resource.RLIMIT_NOFILE]}
    settings["-f"] = limits[resource.RLIMIT_FSIZE] // (1024 if bash else 512)  # bash counts in its own unit
    if resource.RLIMIT_NPROC in limits:
        settings["-u" if bash else "-p"] = limits[resource.RLIMIT_NPROC]
    if resource.RLIMIT_AS in limits:
        settings["-v"] = limits[resource.RLIMIT_AS] // 1024
    if cpu_s is not None:
        settings["-t"] = max(1, round(cpu_s))
    script = "".join(f"ulimit {letter} {value} || exit 126\n" for letter, value in settings.items())
    if directory is not None:
        script += f"cd -- {shlex.quote(directory)} || exit 126\n"
    if command.argv is not None:
        return (shell, "-c", script + 'exec "$@"', "sandbox", *command.argv)
    return (shell, "-c", script + (command.shell or ""))


def open_stdin(data: bytes) -> BinaryIO:
    """The bytes as a file: a one-shot run needs nobody to feed it."""
    if not data:
        return open(os.devnull, "rb")
    file = os.fdopen(os.memfd_create("stdin", os.MFD_CLOEXEC), "w+b")
    file.write(data)
    file.seek(0)
    return file
