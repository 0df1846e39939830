"""Ports and unix sockets between a sandbox and the host, both ways, over loopback and files of the test alone."""

from __future__ import annotations

import asyncio
import shlex
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ale.sandbox import Command, Sandbox, SandboxEngine, SandboxSpec

WAIT_S = 60.0
PYTHON = f"LD_LIBRARY_PATH=/.rocklet/lib /.rocklet/bin/python{sys.version_info.major}.{sys.version_info.minor} -I -S -c"
ECHO_SERVER = """
import _socket, posix, select
listener = _socket.socket(*{kind})
listener.bind({address!r}); listener.listen(16)
posix.mkfifo(b'up') ; posix.close(posix.open(b'up', posix.O_WRONLY))
while True:
    fd, _ = listener._accept()
    if posix.fork() == 0:
        while data := posix.read(fd, 65536):
            while data: data = data[posix.write(fd, data):]
        posix._exit(0)
    posix.close(fd)
"""


def python(code: str) -> str:
    return f"{PYTHON} {shlex.quote(code)}"


async def serve_echo(sandbox: Sandbox, kind: str, address: object) -> None:
    """Starts an echo server inside; returns when it listens."""
    code = ECHO_SERVER.format(kind=kind, address=address)
    await sandbox.exec(
        Command(shell=f"({python(code)}) > log 2>&1 & until [ -p up ]; do :; done; cat up", timeout_s=WAIT_S)
    )


async def echoed(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    try:
        async with asyncio.timeout(WAIT_S):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("kind", "address", "inside"),
    [("(2, 1)", ("127.0.0.1", 8080), 8080), ("(1, 1)", b"/tmp/echo.sock", "/tmp/echo.sock")],
    ids=["tcp", "unix"],
)
async def test_a_server_inside_is_reached_from_outside(
    local: SandboxEngine, tmp_path: Path, kind: str, address: object, inside: int | str
) -> None:
    large = bytes(range(256)) * 8000
    async with local.start(SandboxSpec()) as sandbox:
        await serve_echo(sandbox, kind, address)
        async with sandbox.forward(tmp_path / "door", inside):
            answers = await asyncio.gather(*(echoed(tmp_path / "door", large[: 100_000 * i]) for i in range(8)))
            assert answers == [large[: 100_000 * i] for i in range(8)]
            assert await echoed(tmp_path / "door", large) == large
        assert not (tmp_path / "door").exists()


async def test_a_port_where_nobody_listens_closes_the_connection(local: SandboxEngine, tmp_path: Path) -> None:
    async with local.start(SandboxSpec()) as sandbox, sandbox.forward(tmp_path / "door", 9):
        with suppress(ConnectionError):
            assert await echoed(tmp_path / "door", b"hello") == b""
        assert (await sandbox.exec(Command(shell="echo alive"))).stdout == b"alive\n"


class Upper:
    """A server on the host at a unix socket that answers in upper case, whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.served = 0

    async def __aenter__(self) -> Upper:
        self.server = await asyncio.start_unix_server(self.answer, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served += 1
        data = await reader.read()
        writer.write(data.upper())
        writer.write_eof()
        await writer.drain()
        writer.close()


def talk(port: int) -> Command:
    code = f"""
import _socket, posix
s = _socket.socket(2, 1); s.connect(('127.0.0.1', {port}))
data = b'hello ' * 50000
while data: data = data[s.send(data):]
s.shutdown(1)
size = 0
while got := s.recv(65536): size += len(got); first = got[:5]
print(size, got, first if size else None)
"""
    return Command(shell=python(code), timeout_s=WAIT_S)


async def test_a_server_outside_is_reached_from_inside_and_again_after_a_snapshot(
    local: SandboxEngine, tmp_path: Path
) -> None:
    async with Upper(tmp_path / "model") as model, local.start(SandboxSpec()) as sandbox:
        async with sandbox.expose(tmp_path / "model", 8000):
            done = await sandbox.exec(talk(8000))
            assert done.text().startswith("300000 b''"), done
            snapshot = await sandbox.snapshot()
            await snapshot.release()
            done = await asyncio.gather(*(sandbox.exec(talk(8000)) for _ in range(4)))
            assert all(one.text().startswith("300000 b''") for one in done), done
            with pytest.raises(ValueError, match="exposed already"):
                async with sandbox.expose(tmp_path / "model", 8000):
                    pass
        assert (await sandbox.exec(talk(8000))).exit_code != 0  # the listener has gone
    assert model.served == 5


async def test_a_socket_outside_that_is_not_there_resets_the_connection(local: SandboxEngine, tmp_path: Path) -> None:
    async with local.start(SandboxSpec()) as sandbox, sandbox.expose(tmp_path / "nobody", 8000):
        assert (await sandbox.exec(talk(8000))).text() in ("0 b'' None\n", "")
        assert (await sandbox.exec(Command(shell="echo alive"))).stdout == b"alive\n"


async def test_a_port_that_is_taken_is_told(engine: SandboxEngine, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with engine.start(SandboxSpec()) as sandbox:
            if "ALE_ROOT" in (await sandbox.exec(Command(shell="env"))).text():
                with pytest.raises(OSError, match="in use"):
                    async with sandbox.expose(tmp_path / "x", port):
                        pass
            else:  # a network of its own
                async with sandbox.expose(tmp_path / "x", port):
                    pass
        for wrong in (0, 70_000, "relative"):
            with pytest.raises(ValueError):
                async with sandbox.expose(tmp_path / "x", wrong):
                    pass
