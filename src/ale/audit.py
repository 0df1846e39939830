"""What a sandbox is seen to do: audit events, and the alarms that rules raise over them. Plain data for every layer."""

from __future__ import annotations

from typing import Literal

import msgspec

Action = Literal["count", "flag", "stop"]
"""What an alarm does: it is kept, or marks the trajectory too, or ends the sandbox."""

RuleName = Literal["tunnel", "scan", "miner", "tests", "forks"]


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to reach something: `AuditEvent(sandbox="g3-1", command=2, kind="proxy", host="pypi.org", port=443)`.

    `connect` and `datagram` are system calls towards an address beyond the sandbox's own loopback (there is no way
    out that way, so none is allowed), `proxy` a request to the egress proxy, `fork` a process that was refused.
    """

    sandbox: str
    command: int
    """Which command of the sandbox, counted from 1; the last one begun where a background process cannot be told."""
    at_s: float
    """Seconds since the sandbox was opened."""
    kind: Literal["connect", "datagram", "proxy", "fork"]
    host: str = ""
    port: int = 0
    method: str = ""
    allowed: bool = False
    reason: str = ""
    pid: int | None = None
    """Of the process, as seen inside; None: it was gone before it could be looked at."""
    process: str = ""
    sent: int = 0
    received: int = 0
    """Bytes towards the destination and from it."""


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """`Alarm(rule="tunnel", action="stop", sandbox="g3-1", command=2, evidence="ssh -R 8080:localhost:22 host")`."""

    rule: RuleName
    action: Action
    sandbox: str
    command: int
    evidence: str
