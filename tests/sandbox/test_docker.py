"""What only the Docker backend has: images, labels, the sweep, its own way to the proxy, a daemon that may be dead."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ale import doctor
from ale.errors import SandboxError, SandboxUnavailable
from ale.sandbox import Command, Limits, Network, Rule, SandboxSpec, open_engine
from ale.sandbox.docker.container import hardened
from ale.sandbox.docker.daemon import Daemon, connect
from ale.sandbox.docker.engine import open_docker
from ale.sandbox.docker.sweep import labels, remove_all, sweep
from ale.sandbox.egress import EgressProxy
from ale.sandbox.state import PREFIX
from ale.testing.dockerd import Dockerd

from .conftest import containers_of

pytestmark = [pytest.mark.docker, pytest.mark.full]


@asynccontextmanager
async def counted(dockerd: Dockerd) -> AsyncIterator[None]:
    """What the daemon holds afterwards is what it held before."""
    before = await held_by(dockerd)
    yield
    assert await held_by(dockerd) == before


async def held_by(dockerd: Dockerd) -> tuple[int, int, int]:
    """Containers, images and volumes."""
    daemon = await connect(dockerd.host)
    try:
        volumes = (await daemon.docker.volumes.list())["Volumes"]
        containers = await daemon.docker.containers.list(all=True)
        return len(containers), len(await daemon.docker.images.list(all=True)), len(volumes or [])
    finally:
        await daemon.close()


# -- images


async def test_an_image_without_python_or_a_c_library_serves(docker: Any, dockerd: Dockerd, tmp_path: Path) -> None:
    busybox = dockerd.program("busybox")
    if busybox is None or b"/lib" in subprocess.run(["ldd", busybox], capture_output=True).stdout:  # noqa: ASYNC221
        pytest.skip("no static busybox to make such an image of")
    (tmp_path / "bin").mkdir()
    shutil.copy(busybox, tmp_path / "bin" / "busybox")
    for name in ("sh", "cat", "ls", "id"):
        (tmp_path / "bin" / name).symlink_to("busybox")
    image = await docker.import_rootfs(tmp_path)
    async with docker.start(SandboxSpec(image=image)) as sandbox:
        await sandbox.session().exec(Command(shell="x=1; cd /tmp"))
        done = await sandbox.session().exec(Command(shell="pwd; ls /; id -u"))
        await sandbox.write_file("file", b"data")
        assert await sandbox.read_file("file") == b"data"
    assert done.text().split() == ["/tmp", *["app", "bin", "dev", "etc", "proc", "sys", "tmp"], "64753"]


async def test_an_image_is_built_of_a_dockerfile_and_its_variables_hold(
    docker: Any, image: str, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nENV LANGUAGE=go PATH=/opt/go:/usr/bin:/bin\nCOPY file /opt/\n")
    (tmp_path / "file").write_text("built")
    built = await docker.build(tmp_path)
    async with docker.start(SandboxSpec(image=built, env={"LANGUAGE": "rust"})) as sandbox:
        done = await sandbox.exec(Command(shell='cat /opt/file; echo " $LANGUAGE $PATH"'))
    assert done.text() == "built rust /opt/go:/usr/bin:/bin\n"


async def test_what_an_image_sets_for_its_loader_does_not_reach_the_rocklet(
    docker: Any, image: str, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nENV LD_PRELOAD=/no/such.so LD_LIBRARY_PATH=/no\n")
    built = await docker.build(tmp_path)
    async with docker.start(SandboxSpec(image=built)) as sandbox:
        seen = await sandbox.exec(Command(shell='echo "$LD_PRELOAD"'))  # it is still the commands' own
    assert seen.text() == "/no/such.so\n"


async def test_an_image_that_is_not_there_and_cannot_be_pulled_is_named(docker: Any) -> None:
    with pytest.raises(SandboxError, match=r"127\.0\.0\.1:1/none.*could not pull"):
        async with docker.start(SandboxSpec(image="127.0.0.1:1/none:latest")):
            pass


async def test_without_an_image_the_cure_is_told(dockerd: Dockerd) -> None:
    async with open_docker(host=dockerd.host) as engine:
        with pytest.raises(SandboxUnavailable, match=r"sandbox\.image"):
            async with engine.start(SandboxSpec()):
                pass


async def test_a_chain_of_snapshots_is_merged_and_let_go(
    docker: Any, dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ale.sandbox.docker.images.MAX_CHAIN", 3)
    before = docker.statistics().layers
    async with counted(dockerd):
        async with docker.start(SandboxSpec()) as sandbox:
            await sandbox.exec(Command(shell="echo 0 > 0; mkdir d; echo x > d/removed"))
            snapshot = await sandbox.snapshot()
        for number in range(1, 7):
            async with docker.start(SandboxSpec(base=snapshot)) as sandbox:
                await snapshot.release()
                await sandbox.exec(Command(shell=f"echo {number} > {number}; rm -f d/removed"))
                snapshot = await sandbox.snapshot()
            assert snapshot.image.chain <= 3
        done = await docker.run(SandboxSpec(base=snapshot), Command(shell="cat [0-9] | tr -d '\\n'; ls d"))
        assert done.text() == "0123456"
        await snapshot.release()
    assert docker.statistics().layers == before


async def test_a_snapshot_keeps_neither_mounts_nor_tmp(docker: Any, tmp_path: Path) -> None:
    from ale.sandbox import Mount

    (tmp_path / "secret").write_text("answer")
    async with docker.start(SandboxSpec(mounts=(Mount(str(tmp_path), "/tests"),))) as sandbox:
        assert (await sandbox.exec(Command(shell="cat /tests/secret; echo x > /tmp/left"))).text() == "answer"
        snapshot = await sandbox.snapshot()
    done = await docker.run(SandboxSpec(base=snapshot), Command(shell="ls /tests /tmp"))
    await snapshot.release()
    assert done.stdout.split() == [b"/tests:", b"/tmp:"]


async def test_a_snapshot_for_another_workdir_is_refused(docker: Any) -> None:
    async with docker.start(SandboxSpec()) as sandbox:
        snapshot = await sandbox.snapshot()
    with pytest.raises(SandboxError, match="workdir"):
        async with docker.start(SandboxSpec(base=snapshot, workdir="/other")):
            pass
    await snapshot.release()


# -- limits


async def test_what_the_daemon_cannot_enforce_is_said_and_refused(docker: Any) -> None:
    said = docker.capabilities()
    assert all(said[name] for name in ("isolation", "memory", "pids", "cpu share", "disk", "user", "network"))
    if said["disk quota"].startswith("no:"):
        with pytest.raises(SandboxUnavailable, match="disk_mb"):
            async with docker.start(SandboxSpec(limits=Limits(disk_mb=10))):
                pass
    with pytest.raises(SandboxUnavailable, match="inodes"):
        async with docker.start(SandboxSpec(limits=Limits(inodes=10))):
            pass


async def test_an_unknown_runtime_is_named_with_those_there_are(dockerd: Dockerd) -> None:
    with pytest.raises(SandboxUnavailable, match=r"runc.*runsc"):
        async with open_docker(host=dockerd.host, runtime="runsc"):
            pass


# -- the network


async def test_a_policy_is_kept_by_the_proxy_outside(docker: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    rule = Rule(host="127.0.0.1", ports=(port,), private=True)
    ask = (
        "exec 3<>/dev/tcp/127.0.0.1/13128; "
        "printf 'GET http://127.0.0.1:{}/ HTTP/1.1\\r\\nHost: 127.0.0.1:{}\\r\\n\\r\\n' >&3; cat <&3 | tail -n 1"
    )
    async with server, docker.start(SandboxSpec(network=Network(mode="allow", rules=(rule,)))) as sandbox:
        allowed = await sandbox.exec(Command(shell=ask.format(port, port)))
        refused = await sandbox.exec(Command(shell=ask.format(port + 1, port + 1)))
        await (await sandbox.snapshot()).release()
        again = await sandbox.exec(Command(shell=ask.format(port, port)))
        direct = await sandbox.exec(Command(shell=f"exec 3<>/dev/tcp/127.0.0.1/{port}"))
        await sandbox.lock_network()
        locked = await sandbox.exec(Command(shell=ask.format(port, port)))
        audit = [(event.port, event.allowed) for event in sandbox.audit() if event.kind == "proxy"]
    assert (allowed.text(), again.text()) == ("hello", "hello")
    assert "not allowed" in refused.text()
    assert not direct.ok
    assert "hello" not in locked.text()
    assert audit == [(port, True), (port + 1, False), (port, True), (port, False)]


# -- what is left behind

ENGINE = """
import asyncio, sys
from ale.sandbox import Command, Mount, SandboxSpec
from ale.sandbox.docker.engine import open_docker

async def main():
    async with open_docker(host=sys.argv[1], image=sys.argv[2]) as engine:
        async with engine.start(SandboxSpec(label="run-7/3")) as sandbox:
            await sandbox.exec(Command(shell="echo x > f; sleep 1000 > /dev/null 2>&1 &"))
            snapshot = await sandbox.snapshot()
            async with engine.start(SandboxSpec(base=snapshot)) as other:
                await other.exec(Command(shell="sleep 1000 > /dev/null 2>&1 &"))
                print(engine.directory.name, flush=True)
                await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_what_a_killed_engine_leaves_is_labelled_and_removed_by_the_next(dockerd: Dockerd, image: str) -> None:
    async with (
        counted(dockerd),
        open_docker(host=dockerd.host, image=image) as living,
        living.start(SandboxSpec()) as box,
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ENGINE, dockerd.host, image),
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        name = (await process.stdout.readline()).decode().strip()
        process.kill()
        await process.wait()
        labelled = await living.daemon.docker.containers.list(all=True, filters={"label": [f"ale.engine={name}"]})
        assert {container["Labels"]["ale.run"] for container in labelled} == {"run-7", ""}
        async with open_docker(host=dockerd.host):
            assert not await living.daemon.docker.containers.list(all=True, filters={"label": [f"ale.engine={name}"]})
        assert (await box.exec(Command(shell="echo alive"))).text() == "alive\n"


async def test_what_is_not_an_engines_own_is_never_touched(dockerd: Dockerd, image: str) -> None:
    daemon = await connect(dockerd.host)
    stranger = await daemon.create("stranger", {"Image": image, "Cmd": ["sh"], "Labels": {"ale.engine": "something"}})
    async with open_docker(host=dockerd.host):
        pass
    assert (await stranger.show())["Name"] == "/stranger"
    await remove_all(daemon, "something")
    await daemon.close()


async def test_what_cannot_be_removed_keeps_no_engine_from_opening(
    dockerd: Dockerd, image: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"{PREFIX}999999999-1-dead"
    daemon = await connect(dockerd.host)
    stuck = await daemon.create("stuck", {"Image": image, "Cmd": ["sh"], "Labels": labels(dead)})
    await daemon.create("loose", {"Image": image, "Cmd": ["sh"], "Labels": labels(dead)})
    remove = Daemon.remove

    async def refusing(self: Daemon, container: Any) -> None:
        if container.id == stuck.id:
            raise SandboxError("device or resource busy")
        await remove(self, container)

    with monkeypatch.context() as patched:
        patched.setattr(Daemon, "remove", refusing)
        async with open_docker(host=dockerd.host, image=image) as engine:
            assert (await engine.run(SandboxSpec(), Command(shell="echo well"))).text() == "well\n"
    assert f"{dead} left with Docker cannot be removed now: device or resource busy" in caplog.text
    left = await daemon.docker.containers.list(all=True, filters={"label": [f"ale.engine={dead}"]})
    assert [container.id for container in left] == [stuck.id]
    assert await sweep(daemon) == [dead]
    await daemon.close()


async def test_a_container_is_removed_whatever_its_proxy_says_at_its_end(
    docker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(self: EgressProxy) -> None:
        raise OSError("the proxy is stuck")

    policy = Network(mode="allow", rules=(Rule(host="nobody.invalid"),))
    with pytest.raises(OSError, match="the proxy is stuck"):
        async with docker.start(SandboxSpec(network=policy)) as sandbox:
            proxy = sandbox._proxy
            monkeypatch.setattr(EgressProxy, "close", failing)
    monkeypatch.undo()
    await proxy.close()
    assert not await containers_of(docker)
    assert list((docker.directory / "boxes").iterdir()) == []


# -- a daemon that is not there


async def test_nothing_behind_the_socket_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SandboxUnavailable, match="DOCKER_HOST"):
        async with open_docker(host=f"unix://{tmp_path}/none.sock"):
            pass


async def test_a_daemon_that_never_answers_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.sandbox.docker.daemon._GREETING_S", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        with pytest.raises(SandboxUnavailable, match="no answer to say its version"):
            async with open_docker(host=f"unix://{tmp_path}/silent.sock"):
                pass


async def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(SandboxUnavailable, match="ssh -L"):
        async with open_docker(host="ssh://host"):
            pass


async def test_open_engine_finds_the_daemon_by_docker_host(
    dockerd: Dockerd, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", dockerd.host)
    async with open_engine("docker", image=image) as engine:
        assert (await engine.run(SandboxSpec(), Command(shell="echo here"))).text() == "here\n"


async def test_a_container_has_no_way_to_any_network(docker: Any) -> None:
    async with docker.start(SandboxSpec()) as sandbox:
        interfaces = await sandbox.exec(Command(shell="tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"))
        routes = await sandbox.exec(Command(shell="tail -n +2 /proc/net/route; grep -v ' lo$' /proc/net/ipv6_route"))
    assert interfaces.text() == "lo\n"
    assert routes.stdout == b""


async def test_a_command_can_neither_be_the_bridge_nor_end_it(docker: Any) -> None:
    pose = """
import _socket
end = _socket.socket(_socket.AF_UNIX)
end.connect(bytes(1) + b"rocklet")
print(end.recv(100))
"""
    python = (*docker.bridge[:-2], "-c")
    find = "for p in /proc/[0-9]*; do grep -qzx bridge $p/cmdline && echo ${p#/proc/}; done"
    async with docker.start(SandboxSpec()) as sandbox:
        posed = await sandbox.exec(Command(argv=(*python, pose)))
        found = (await sandbox.exec(Command(shell=find))).text().split()
        killed = await sandbox.exec(Command(shell=f"kill -KILL {found[0]}; cat /proc/{found[0]}/environ"))
        await sandbox.exec(Command(shell="kill -KILL -1"))
        assert (await sandbox.exec(Command(shell="echo alive"))).text() == "alive\n"
        assert sandbox.statistics().reconnects == 0
    assert posed.text() == "b''\n", posed.text("stderr")
    assert not killed.ok
    assert killed.stderr.count(b"ermi") >= 2  # Operation not permitted, Permission denied


async def test_the_doctor_says_what_docker_offers(dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", dockerd.host)
    found = [finding async for finding in doctor._docker_sandboxes()]
    assert doctor._docker().level == "ok"
    assert {"  isolation", "  memory", "  disk quota", "  network"} <= {finding.subject for finding in found}


async def test_the_proxy_is_asked_whatever_an_image_sets(docker: Any, image: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nENV http_proxy=http://elsewhere:1\n")
    policy = Network(mode="allow", rules=(Rule(host="nobody.invalid"),))
    async with docker.start(SandboxSpec(image=await docker.build(tmp_path), network=policy)) as sandbox:
        assert (await sandbox.exec(Command(shell="echo $http_proxy"))).text() == "http://127.0.0.1:13128\n"


async def test_it_serves_under_uvloop_too(dockerd: Dockerd, image: str) -> None:
    uvloop = pytest.importorskip("uvloop")
    refusing = Network(mode="allow", rules=(Rule(host="nobody.invalid"),))
    ask = "exec 3<>/dev/tcp/127.0.0.1/13128; printf 'CONNECT 127.0.0.1:1 HTTP/1.1\\r\\n\\r\\n' >&3; head -n 1 <&3"

    async def use() -> bytes:
        async with (
            open_docker(host=dockerd.host, image=image) as engine,
            engine.start(SandboxSpec(network=refusing)) as sandbox,
        ):
            await sandbox.write_file("file", b"x" * 1_000_000)
            done = await sandbox.exec(Command(shell=f"wc -c < file; {ask}"))
            return done.stdout

    def under_uvloop() -> bytes:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(use())

    assert (await asyncio.to_thread(under_uvloop)).startswith(b"1000000\nHTTP/1.1 403")


async def test_a_daemon_that_confines_nothing_is_refused(dockerd: Dockerd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ale.sandbox.docker.engine.hardened",
        lambda runtime: {**hardened(runtime), "SecurityOpt": ["seccomp=unconfined"]},
    )
    async with counted(dockerd):
        with pytest.raises(SandboxUnavailable, match="seccomp-profile"):
            async with open_docker(host=dockerd.host):
                pass
