"""The egress proxy: policy, heads that lie, names that lead elsewhere, and what passes. Traffic stays on loopback."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from ale.sandbox.egress import EgressProxy, Request, hang_up
from ale.sandbox.http_head import BadRequest, parse_head
from ale.sandbox.network import Network, Rule

HERE = "127.0.0.1"


class Origin:
    """A server on loopback: keeps what it is sent, answers as an HTTP server would, or echoes."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.got = b""
        self.connections = 0
        self.port = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Origin]:
        server = await asyncio.start_server(self._serve, HERE, 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self.echo:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            else:
                self.got += await reader.readuntil(b"\r\n\r\n")
                if b"content-length" in self.got.lower():
                    self.got += await reader.readexactly(5)
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort() if self.echo else await hang_up(writer)


@asynccontextmanager
async def proxy(network: Network, **options: object) -> AsyncIterator[tuple[int, list[Request], EgressProxy]]:
    log: list[Request] = []
    served = EgressProxy(network, log.append, **options)  # type: ignore[arg-type]
    listener = socket.create_server((HERE, 0))
    port = listener.getsockname()[1]
    await served.start(listener)
    try:
        yield port, log, served
    finally:
        await served.close()


async def send(port: int, data: bytes, *, end: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection(HERE, port)
    writer.write(data)
    if end:
        writer.write_eof()
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        await hang_up(writer)


def allow(port: int, host: str = HERE, **fields: object) -> Network:
    return Network(mode="allow", rules=(Rule(host=host, ports=(port,), **fields),))  # type: ignore[arg-type]


async def test_an_allowed_request_passes_and_is_accounted_for() -> None:
    async with Origin().open() as origin, proxy(allow(origin.port)) as (port, log, _):
        head = f"GET http://{HERE}:{origin.port}/a?b HTTP/1.1\r\nHost: {HERE}:{origin.port}\r\nAccept: x\r\n\r\n"
        answer = await send(port, head.encode())
    assert answer.endswith(b"hello")
    assert origin.got.startswith(b"GET /a?b HTTP/1.1\r\n")
    (request,) = log
    assert (request.method, request.host, request.port, request.allowed) == ("GET", HERE, origin.port, True)
    assert request.sent == len(origin.got)
    assert request.received == len(answer)


@pytest.mark.parametrize(
    "head",
    [
        "POST http://{}/ HTTP/1.1\r\nContent-Length: 5\r\n\r\n12345",
        "POST http://{}/ HTTP/1.1\r\nContent-Length: 5\r\n\r\n12345GET /",
    ],
)
async def test_a_body_passes_and_not_a_byte_more(head: str) -> None:
    async with Origin().open() as origin, proxy(allow(origin.port)) as (port, _, _):
        await send(port, head.format(f"{HERE}:{origin.port}").encode())
    assert origin.got.endswith(b"\r\n\r\n12345")


async def test_a_tunnel_carries_any_protocol_both_ways() -> None:
    async with Origin(echo=True).open() as origin, proxy(allow(origin.port, methods=("CONNECT",))) as (port, log, _):
        payload = bytes(range(256)) * 2000
        answer = await send(port, f"CONNECT {HERE}:{origin.port} HTTP/1.1\r\n\r\n".encode() + payload, end=True)
        plain = await send(port, f"GET http://{HERE}:{origin.port}/ HTTP/1.1\r\n\r\n".encode())
    assert answer == b"HTTP/1.1 200 Connection established\r\n\r\n" + payload
    assert plain.startswith(b"HTTP/1.1 403")
    assert (log[0].sent, log[0].received) == (len(payload), len(payload))


POST = "POST http://{host}:{port}/ HTTP/1.1\r\n"
REFUSED = {
    "another port": "CONNECT {host}:22 HTTP/1.1\r\n\r\n",
    "another host": "CONNECT localhost:{port} HTTP/1.1\r\n\r\n",
    "the same address as a number": "CONNECT 2130706433:{port} HTTP/1.1\r\n\r\n",
    "the same address in hexadecimal": "CONNECT 0x7f000001:{port} HTTP/1.1\r\n\r\n",
    "the same address, shortened": "CONNECT 127.1:{port} HTTP/1.1\r\n\r\n",
    "the same address, mapped": "CONNECT [::ffff:127.0.0.1]:{port} HTTP/1.1\r\n\r\n",
    "any address": "CONNECT 0.0.0.0:{port} HTTP/1.1\r\n\r\n",
    "metadata": "GET http://169.254.169.254/latest/meta-data HTTP/1.1\r\n\r\n",
    "a user name before the host": "GET http://{host}:{port}@evil.example/ HTTP/1.1\r\n\r\n",
    "an allowed user name": "GET http://evil.example@{host}:{port}/ HTTP/1.1\r\n\r\n",
    "a Host that differs": "GET http://{host}:{port}/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "two Hosts": "GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\nHost: {host}:{port}\r\n\r\n",
    "no absolute address": "GET / HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n",
    "another scheme": "GET https://{host}:{port}/ HTTP/1.1\r\n\r\n",
    "a file": "GET file:///etc/passwd HTTP/1.1\r\n\r\n",
    "two lengths": "POST http://{host}:{port}/ HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    "a length and chunks": POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a disguised coding": "POST http://{host}:{port}/ HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a signed length": "POST http://{host}:{port}/ HTTP/1.1\r\nContent-Length: +5\r\n\r\n12345",
    "a blank before the colon": "POST http://{host}:{port}/ HTTP/1.1\r\nContent-Length : 5\r\n\r\n12345",
    "a folded line": "GET http://{host}:{port}/ HTTP/1.1\r\nA: b\r\n c: d\r\n\r\n",
    "a lone line feed": "GET http://{host}:{port}/ HTTP/1.1\r\nA: b\nHost: evil.example\r\n\r\n",
    "a lone carriage return": "GET http://{host}:{port}/ HTTP/1.1\r\nA: b\rHost: evil.example\r\n\r\n",
    "a NUL byte": "GET http://{host}:{port}/\0 HTTP/1.1\r\n\r\n",
    "a blank in the target": "GET http://{host}:{port}/a b HTTP/1.1\r\n\r\n",
    "a hidden framing header": POST + "Connection: content-length\r\nContent-Length: 5\r\n\r\n12345",
    "a destination without a port": "CONNECT {host} HTTP/1.1\r\n\r\n",
    "port 0": "CONNECT {host}:0 HTTP/1.1\r\n\r\n",
    "a port beyond all": "CONNECT {host}:65537 HTTP/1.1\r\n\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS hello": "\x16\x03\x01\x02\x00\x01\r\n\r\n",
}


async def test_requests_that_are_not_allowed_or_can_be_read_in_two_ways_are_refused() -> None:
    async with Origin().open() as origin, proxy(allow(origin.port)) as (port, log, _):
        for name, text in REFUSED.items():
            answer = await send(port, text.format(host=HERE, port=origin.port).encode("latin-1"))
            assert answer[9:12] in (b"400", b"403"), name
    assert origin.connections == 0
    assert len(log) == len(REFUSED)
    assert not any(request.allowed for request in log)
    assert all(request.reason.startswith("refused") for request in log)


async def test_a_head_without_end_is_cut_off() -> None:
    async with proxy(allow(80)) as (port, log, _):
        answer = await send(port, b"GET http://x/ HTTP/1.1\r\nA: " + b"a" * 100_000)
    assert answer.startswith(b"HTTP/1.1 431")
    assert not log[0].allowed


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *(
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
            "fc00::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
        ),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1", "240.0.0.1", "255.255.255.255"),
    ],
)
async def test_a_name_that_leads_to_a_private_address_is_refused(address: str) -> None:
    async def rebound(host: str, port: int) -> list[str]:
        return [address]

    rules = (Rule(host="mirror.example"), Rule(host="*"))
    async with proxy(Network(mode="allow", rules=rules), resolver=rebound) as (port, log, _):
        answer = await send(port, b"CONNECT mirror.example:443 HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403")
    assert address.encode() in answer
    assert not log[0].allowed


async def test_a_name_is_resolved_once_and_only_when_it_is_covered() -> None:
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return [HERE] if len(asked) == 1 else ["10.0.0.1"]

    async with (
        Origin().open() as origin,
        proxy(allow(origin.port, "mirror.example", private=True), resolver=rebinding) as (port, _, _),
    ):
        answer = await send(port, f"GET http://mirror.example:{origin.port}/ HTTP/1.1\r\n\r\n".encode())
        await send(port, f"CONNECT secret.evil.example:{origin.port} HTTP/1.1\r\n\r\n".encode())
    assert answer.endswith(b"hello")
    assert asked == ["mirror.example"]


async def test_locking_cuts_what_is_open_and_refuses_what_comes() -> None:
    async with Origin(echo=True).open() as origin, proxy(allow(origin.port)) as (port, log, served):
        reader, writer = await asyncio.open_connection(HERE, port)
        writer.write(f"CONNECT {HERE}:{origin.port} HTTP/1.1\r\n\r\nping".encode())
        assert (await reader.readuntil(b"ping")).startswith(b"HTTP/1.1 200")
        await served.lock()
        with suppress(ConnectionError):
            assert await reader.read() == b""
        await hang_up(writer)
        answer = await send(port, f"CONNECT {HERE}:{origin.port} HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403")
    assert [request.allowed for request in log] == [True, False]


async def test_connections_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.sandbox.egress.MAX_CONNECTIONS", 2)
    async with proxy(allow(80)) as (port, log, served):
        held = [await asyncio.open_connection(HERE, port) for _ in range(2)]
        while len(served._open) < 2:
            await asyncio.sleep(0)
        assert (await send(port, b"")).startswith(b"HTTP/1.1 503")
        for _, writer in held:
            await hang_up(writer)
    assert len(log) == 3


@pytest.mark.parametrize(
    ("rule", "host", "covered"),
    [
        ("pypi.org", "pypi.org", True),
        ("pypi.org", "evil-pypi.org", False),
        ("pypi.org", "pypi.org.evil.example", False),
        ("*.pypi.org", "files.pypi.org", True),
        ("*.pypi.org", "pypi.org", False),
        ("*.pypi.org", "evilpypi.org", False),
        ("*", "anything.example", True),
    ],
)
def test_a_rule_covers_whole_names(rule: str, host: str, covered: bool) -> None:
    assert Rule(host=rule).covers("GET", host, 80) is covered


def test_an_address_in_a_rule_is_the_permission_for_it() -> None:
    metadata = ipaddress.ip_address("169.254.169.254")
    assert Rule(host="169.254.169.254").permits(metadata)
    assert not Rule(host="*", private=True).permits(metadata)
    assert Rule(host="*", private=True).permits(ipaddress.ip_address("10.0.0.1"))
    assert not Network(mode="full").rule_for("GET", "x.example", 80).permits(ipaddress.ip_address("10.0.0.1"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rule(host="PyPI.org"),
        lambda: Rule(host="a..b"),
        lambda: Rule(host="*.*"),
        lambda: Rule(host="x", ports=(0,)),
        lambda: Rule(host="x", methods=("get",)),
        lambda: Network(mode="allow"),
        lambda: Network(mode="none", rules=(Rule(host="x"),)),
    ],
)
def test_a_policy_that_says_nothing_clear_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_chunks_are_recognised_and_bytes_beyond_ascii_refused() -> None:
    assert parse_head(b"POST http://x/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").body is None
    with pytest.raises(BadRequest):
        parse_head("GET http://x/\u00fc HTTP/1.1\r\n\r\n".encode())
