"""The audit log of one sandbox: its events, its alarms, and which command they belong to."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ale.audit import Alarm, AuditEvent, RuleName
from ale.errors import SandboxStopped
from ale.sandbox.alarms import AlarmRules, heard, seen
from ale.sandbox.egress import Asker, Request
from ale.sandbox.network import PROXY_PORT
from ale.sandbox.watch import Attempt, local_port

MAX_EVENTS = 1000  # kept; beyond that they are counted
_MAX_EVIDENCE = 300
_MAX_PENDING = 64


class AuditLog:
    def __init__(self, sandbox: str, rules: AlarmRules, stop: Callable[[SandboxStopped], None]) -> None:
        """`stop` is called once, when an alarm ends the sandbox."""
        self.sandbox, self._rules, self._stop = sandbox, rules, stop
        self.events: list[AuditEvent] = []
        self.alarms: list[Alarm] = []
        self.dropped = 0
        """Events beyond MAX_EVENTS."""
        self._opened = time.monotonic()
        self._numbers = itertools.count(1)
        self._last = 0
        self._tried: tuple[int, set[tuple[str, int]]] = (0, set())  # a command, and its destinations
        self._running: dict[int, bytes] = {}  # number -> its command line, as the kernel shows it
        self._asking: deque[Attempt] = deque(maxlen=_MAX_PENDING)  # on their way to the proxy
        self.stopped: SandboxStopped | None = None

    @contextmanager
    def command(self, argv: bytes) -> Iterator[int]:
        """The time of one command (arguments with NULs between), which gets the next number. Raises SandboxStopped when
        a rule forbids it."""
        number = self._last = next(self._numbers)
        for rule, evidence in heard(argv.replace(b"\0", b"\n").decode("utf-8", "replace")):
            self._alarm(rule, number, evidence)
        if self.stopped is not None:
            raise self.stopped
        self._running[number] = argv + b"\0"
        try:
            yield number
        finally:
            del self._running[number]

    def attempt(self, attempt: Attempt) -> None:
        """A connection that a program is about to try: `Watch` calls it."""
        if attempt.host.startswith("127.") or attempt.host in ("::1", "0.0.0.0", "::"):
            if attempt.port == PROXY_PORT:
                self._asking.append(attempt)
            return
        inside, name = identity(attempt.pid)
        self._add(
            kind="connect" if attempt.kind == "connect" else "datagram",
            command=self._command_of(attempt.pid),
            host=attempt.host,
            port=attempt.port,
            reason="no way out but the egress proxy",
            pid=inside,
            process=name,
        )

    def asker(self, port: int) -> Asker:
        """Whose connection to the proxy it is that comes from a port: one of those that were announced."""
        attempt = next((a for a in self._asking if local_port(a.pid, a.fd) == port), None)
        if attempt is None:
            return Asker(self._last)
        self._asking.remove(attempt)
        return Asker(self._command_of(attempt.pid), *identity(attempt.pid))

    def request(self, request: Request) -> None:
        """A request to the proxy that has ended: `EgressProxy` calls it."""
        self._add(
            kind="proxy",
            command=request.asker.command,
            host=request.host,
            port=request.port,
            method=request.method,
            allowed=request.allowed,
            reason=request.reason,
            pid=request.asker.pid,
            process=request.asker.process,
            sent=request.sent,
            received=request.received,
        )

    def forks_refused(self, command: int, count: int) -> None:
        self._add(kind="fork", command=command, reason=f"{count} processes refused")

    def _add(self, **fields: object) -> None:
        event = AuditEvent(sandbox=self.sandbox, at_s=time.monotonic() - self._opened, **fields)  # type: ignore[arg-type]
        if self._tried[0] != event.command:
            self._tried = (event.command, set())
        for rule, evidence in seen(event, self._tried[1]):
            self._alarm(rule, event.command, evidence)
        if len(self.events) < MAX_EVENTS:
            self.events.append(event)
        else:
            self.dropped += 1

    def _alarm(self, rule: RuleName, command: int, evidence: str) -> None:
        action = getattr(self._rules, rule)
        if action is None or any(alarm.rule == rule and alarm.command == command for alarm in self.alarms):
            return  # once a command is enough
        alarm = Alarm(
            rule=rule, action=action, sandbox=self.sandbox, command=command, evidence=evidence[:_MAX_EVIDENCE]
        )
        self.alarms.append(alarm)
        if action == "stop" and self.stopped is None:
            self.stopped = SandboxStopped(f"sandbox {self.sandbox} was stopped: {rule}: {alarm.evidence}")
            self._stop(self.stopped)

    def _command_of(self, pid: int) -> int:
        """By the process's ancestors, when more than one command is running."""
        if len(self._running) == 1:
            return next(iter(self._running))
        for ancestor in ancestors(pid) if self._running else ():
            line = _read(f"/proc/{ancestor}/cmdline")
            for number, argv in self._running.items():
                if line == argv:
                    return number
        return self._last


def ancestors(pid: int) -> Iterator[int]:
    """The process and its parents, as far as they can be seen."""
    for _ in range(64):  # bounded: a pid that is reused meanwhile could close a circle
        if pid <= 1:
            return
        yield pid
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        pid = int(fields[1]) if len(fields) > 1 else 0


def identity(pid: int) -> tuple[int | None, str]:
    """(pid inside, name) of a process in a sandbox."""
    facts = dict(line.partition(b":\t")[::2] for line in _read(f"/proc/{pid}/status").splitlines())
    inside = facts.get(b"NSpid", b"").split()
    return (int(inside[-1]) if inside else None), facts.get(b"Name", b"").decode("utf-8", "replace")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
