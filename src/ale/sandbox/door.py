"""The door: a socket through which a rocklet is handed another connection when one broke."""

from __future__ import annotations

import socket

from ale.errors import SandboxError


class Door:
    """Give `inner` to the rocklet as its descriptor 1, then `shut_inner`. Its end tells the rocklet to end too."""

    def __init__(self) -> None:
        self._outer, self.inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._outer.setblocking(False)

    def shut_inner(self) -> None:
        self.inner.close()

    async def connect(self) -> socket.socket:
        """Another connection to the same rocklet. Raises SandboxError when it has ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._outer, [b"c"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise SandboxError("the sandbox's agent has ended") from error
        return ours

    def close(self) -> None:
        self._outer.close()
        self.inner.close()
