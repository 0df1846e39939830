"""A process that has everything imported and forks engines, one at a time: a test can kill one every fraction of a
second without waiting for an interpreter."""

from __future__ import annotations

import select
import subprocess
import sys

_ANSWER_S = 30.0

# Before it stands code with a coroutine function `main(seed)`, which never returns.
_FORKS = """
import os
for line in sys.stdin:
    if (child := os.fork()) == 0:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        asyncio.run(main(int(line)))
        os._exit(1)  # never: it is killed
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Mother:
    def __init__(self, code: str, *arguments: str) -> None:
        """`code` imports what `main` needs, asyncio and sys among it."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", code + _FORKS, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _say(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], _ANSWER_S)[0]
        return int(self._process.stdout.readline())

    def bear(self, seed: int) -> int:
        """The pid of a process in which `main(seed)` runs."""
        return self._say(str(seed))

    def status_of_the_dead(self) -> int:
        """How the last one ended, as `subprocess` has it. Waits for that."""
        return self._say("")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(_ANSWER_S)
        self._process.stdout.close()
