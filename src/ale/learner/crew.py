"""The other ranks' processes as rank 0 has them: started, told every request, watched, ended.

No update can be made without one of them, so the learner ends with the first that dies: a thread waits for that, for
the main one may be inside a collective. Whoever started the learner reads which rank it was, and how it ended, from the
learner's last words. The ranks end with rank 0, however that ends.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, NoReturn

from ale.errors import LearnerError
from ale.messages import OpenLearner, OpenRank
from ale.process import request_frame

_GRACE_S = 5.0


class Crew:
    """Use `with Crew(settings) as crew`: leaving it ends the processes."""

    def __init__(self, settings: OpenLearner) -> None:
        self._settings = settings
        self.size = settings.learner.ranks
        self._store_fd = -1
        self._members: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self._ending = False

    def __enter__(self) -> Crew:
        self._store_fd = os.memfd_create("ale-ranks", os.MFD_CLOEXEC)  # where they meet: nothing to leave behind
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            ours.settimeout(self._settings.learner.step_deadline_s)
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ale.learner.rank_process", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(), self._settings.weights_fd, self._store_fd),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            self._members.append((process, ours))
            ours.sendall(request_frame(OpenRank(settings=self._settings, rank=rank, store=self.store)))
        # A daemon: it waits, without a deadline, for what should not happen before the end.
        threading.Thread(target=self._watch, name="watch of the ranks", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        for _, connection in self._members:
            connection.close()
        for process, _ in self._members:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.close(self._store_fd)

    @property
    def store(self) -> str:
        return f"/proc/self/fd/{self._store_fd}"

    def tell(self, request: Any) -> None:
        """Hands a request to every other rank. Raises `LearnerError` when one does not take it."""
        frame = request_frame(request)
        for rank, (_, connection) in enumerate(self._members, start=1):
            try:
                connection.sendall(frame)
            except OSError as error:
                raise LearnerError(
                    f"rank {rank} of the learner does not take {type(request).__name__}: {error}"
                ) from error

    def _watch(self) -> None:
        pidfds = {os.pidfd_open(process.pid): rank for rank, (process, _) in enumerate(self._members, start=1)}
        ended = select.poll()
        for fd in pidfds:
            ended.register(fd, select.POLLIN)
        fd, _ = ended.poll()[0]
        if self._ending:
            return
        process, _ = self._members[pidfds[fd] - 1]
        code = process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        end_with(
            f"rank {pidfds[fd]} of the learner's {self.size} ended ({how}; process {process.pid}). No update can be "
            "made without it, so the learner ends."
        )


def end_with(said: str) -> NoReturn:
    """The last words of a rank whose others may wait for it: it ends at once, and they with it."""
    print(said, file=sys.stderr, flush=True)
    os._exit(1)
