"""Faults at random moments, twenty times each: ends of the engine, the daemon, the rocklet, a process inside, starts
and commands, and a full disk. Counted before and after: containers, images, volumes, the daemon's helpers,
descriptors, tasks, directories."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ale.errors import SandboxError
from ale.sandbox import Command, SandboxSpec
from ale.sandbox.docker.daemon import connect
from ale.sandbox.docker.engine import open_docker
from ale.sandbox.state import PREFIX
from ale.testing.dockerd import Dockerd, Unavailable, own_dockerd

from .conftest import import_rootfs
from .counted import below, descriptors, failure_on_a_full_disk, moment
from .mother import Mother

pytestmark = [pytest.mark.docker, pytest.mark.full, pytest.mark.timeout(900)]

TIMES = 20
END_S = 60.0
ENDLESS = Command(shell="echo x >> count; sleep 1000 & setsid sleep 1000 & sleep 1000", timeout_s=900)


class Held(NamedTuple):
    containers: int
    images: int
    volumes: int
    helpers: int
    contained: int
    tasks: int
    directories: int


async def held_by(dockerd: Dockerd, state: Path, *, shims: bool = True) -> Held:
    daemon = await connect(dockerd.host)
    try:
        containers = len(await daemon.docker.containers.list(all=True))
        images = len(await daemon.docker.images.list(all=True))
        volumes = len((await daemon.docker.volumes.list())["Volumes"] or [])
    finally:
        await daemon.close()
    async with asyncio.timeout(END_S):  # a shim ends a moment after its container, a rocklet that is alone after a few
        while (shims and len(dockerd.helpers()) > 1) or dockerd.contained():
            await asyncio.sleep(0.05)
    return Held(
        containers,
        images,
        volumes,
        len(dockerd.helpers()) if shims else 0,
        len(dockerd.contained()),
        len(asyncio.all_tasks()),
        sum(name.startswith(PREFIX) for name in os.listdir(state)),
    )


@asynccontextmanager
async def nothing_is_left(dockerd: Dockerd, state: Path, *, shims: bool = True) -> AsyncIterator[None]:
    before, opened = await held_by(dockerd, state, shims=shims), descriptors()
    yield
    assert await held_by(dockerd, state, shims=shims) == before
    assert not descriptors() - opened


async def test_a_start_that_is_cancelled_at_any_moment_leaves_nothing(
    dockerd: Dockerd, image: str, tmp_path: Path
) -> None:
    chance = random.Random(1)
    base = tmp_path / "base"
    base.mkdir()
    (base / "file").write_text("x")
    state = tmp_path / "state"
    state.mkdir()
    async with nothing_is_left(dockerd, state), open_docker(host=dockerd.host, image=image, state_dir=state) as engine:

        async def use() -> None:
            async with engine.start(SandboxSpec(base=(str(base),))) as sandbox:
                await sandbox.exec(ENDLESS)

        for _ in range(TIMES):
            using = asyncio.ensure_future(use())
            await moment(chance, 0.6)
            using.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(END_S):
                    await using
            assert engine.statistics().alive == 0
            assert list((engine.directory / "boxes").iterdir()) == []


async def test_a_command_that_is_cancelled_at_any_moment_is_gone_and_its_sandbox_goes_on(
    dockerd: Dockerd, image: str, tmp_path: Path
) -> None:
    chance = random.Random(2)
    async with (
        nothing_is_left(dockerd, tmp_path),
        open_docker(host=dockerd.host, image=image, state_dir=tmp_path) as engine,
        engine.start(SandboxSpec()) as sandbox,
    ):
        for _ in range(TIMES):
            running = asyncio.ensure_future(sandbox.exec(ENDLESS))
            await moment(chance, 0.1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(END_S):
                    await running
            seen = await sandbox.exec(
                Command(shell="ps -e -o comm= 2> /dev/null | grep -c sleep || cat /proc/[0-9]*/comm")
            )
            assert "sleep" not in seen.text()
        assert len((await sandbox.read_file("count")).split()) <= TIMES


async def test_a_sandbox_closes_whatever_runs_in_it(dockerd: Dockerd, image: str, tmp_path: Path) -> None:
    chance = random.Random(3)
    async with (
        nothing_is_left(dockerd, tmp_path),
        open_docker(host=dockerd.host, image=image, state_dir=tmp_path) as engine,
    ):
        for _ in range(TIMES):
            async with engine.start(SandboxSpec()) as sandbox:
                assert dockerd.contained()
                running = asyncio.ensure_future(sandbox.exec(ENDLESS))
                await moment(chance, 0.1)
                async with asyncio.timeout(END_S):
                    await sandbox.close()
                    with pytest.raises(SandboxError):
                        await running


async def test_a_rocklet_that_is_killed_breaks_its_sandbox_alone(dockerd: Dockerd, image: str, tmp_path: Path) -> None:
    chance = random.Random(4)
    async with (
        nothing_is_left(dockerd, tmp_path),
        open_docker(host=dockerd.host, image=image, state_dir=tmp_path) as engine,
        engine.start(SandboxSpec()) as neighbour,
    ):
        for number in range(1, TIMES + 1):
            async with engine.start(SandboxSpec()) as sandbox:
                state = (await sandbox._container.show())["State"]
                running = asyncio.ensure_future(sandbox.exec(ENDLESS))
                await moment(chance, 0.1)
                os.kill(state["Pid"], signal.SIGKILL)
                async with asyncio.timeout(END_S):
                    with pytest.raises(SandboxError):
                        await running
                    with pytest.raises(SandboxError, match="broken"):
                        await sandbox.exec(Command(shell="true"))
            assert engine.statistics().broken == number
        assert (await neighbour.exec(Command(shell="echo alive"))).text() == "alive\n"


async def test_a_process_inside_that_is_killed_is_what_its_command_says(
    dockerd: Dockerd, image: str, tmp_path: Path
) -> None:
    chance = random.Random(6)
    ends = []
    async with (
        nothing_is_left(dockerd, tmp_path),
        open_docker(host=dockerd.host, image=image, state_dir=tmp_path) as engine,
        engine.start(SandboxSpec()) as sandbox,
    ):
        rocklet = (await sandbox._container.show())["State"]["Pid"]
        while len(ends) < TIMES:
            line = "echo x >> count; /bin/sh -c '/bin/sleep 1000; exit 5'; echo $?"
            running = asyncio.ensure_future(sandbox.exec(Command(argv=("/bin/bash", "-c", line), timeout_s=900)))
            async with asyncio.timeout(END_S):
                while len(found := below(rocklet)) < chance.randint(1, 3):
                    await asyncio.sleep(0.001)
                with suppress(ProcessLookupError):  # it has just become another, or has ended
                    os.kill(chance.choice(found), signal.SIGKILL)
                    done = await running
                    ends.append((done.signal, done.exit_code, done.text().strip()))
                    assert not done.timed_out
                await sandbox.exec(Command(argv=("/bin/bash", "-c", "kill -9 -1")))
                await asyncio.wait([running])
                while below(rocklet):  # what has its signal is no victim of the next round
                    await asyncio.sleep(0.001)
            assert (await sandbox.exec(Command(shell=f"echo {len(ends)}"))).text() == f"{len(ends)}\n"
    # The shell was killed; a child was, and the shell tells it; the program of a child was, and the child tells it.
    assert set(ends) <= {(signal.SIGKILL, None, ""), (None, 0, "137"), (None, 0, "5")}


ENGINE = """
import asyncio, random, sys
from pathlib import Path
from ale.sandbox import Command, SandboxSpec
from ale.sandbox.docker.engine import open_docker

async def live(engine):
    while True:
        async with engine.start(SandboxSpec()) as sandbox:
            await sandbox.exec(Command(shell="echo x > f; setsid sleep 1000 > /dev/null 2>&1 &"))
            snapshot = await sandbox.snapshot()
            assert (await engine.run(SandboxSpec(base=snapshot), Command(shell="cat f"))).text() == "x\\n"
            await snapshot.release()

async def main(seed):
    async with open_docker(host=sys.argv[1], image=sys.argv[2], state_dir=Path(sys.argv[3])) as engine:
        await asyncio.gather(live(engine), live(engine))
"""


async def test_an_engine_that_is_killed_at_any_moment_leaves_nothing_that_the_next_does_not_take(
    dockerd: Dockerd, image: str, tmp_path: Path
) -> None:
    chance = random.Random(8)
    state = tmp_path / "state"
    state.mkdir()
    async with nothing_is_left(dockerd, state):
        mother = Mother(ENGINE, dockerd.host, image, str(state))
        try:
            for seed in range(TIMES):
                engine = mother.bear(seed)
                await moment(chance, 4.0)
                os.kill(engine, signal.SIGKILL)
                assert mother.status_of_the_dead() == -signal.SIGKILL
                async with asyncio.timeout(END_S):
                    # What the daemon still does for the dead engine, as a commit, may come after this sweep.
                    async with open_docker(host=dockerd.host, image=image, state_dir=state) as next_one:
                        assert (await next_one.run(SandboxSpec(), Command(shell="echo well"))).text() == "well\n"
        finally:
            mother.close()
        async with open_docker(host=dockerd.host, state_dir=state):
            pass


# -- a disk that is full


@pytest.fixture
def cramped() -> Iterator[Dockerd]:
    """A daemon whose data lie on a small file system."""
    try:
        with own_dockerd(data_bytes=768 << 20) as dockerd:
            yield dockerd
    except Unavailable as error:
        pytest.skip(f"no Docker engine: {error}")


async def test_a_daemon_whose_disk_fills_up_at_any_moment_goes_on_when_there_is_room(
    cramped: Dockerd, tmp_path: Path
) -> None:
    chance = random.Random(7)
    image = await import_rootfs(cramped, tmp_path)
    base, state = tmp_path / "base", tmp_path / "state"
    for folder in (base, state):
        folder.mkdir()
    (base / "data").write_bytes(b"d" * 500_000)
    disk, failed = cramped.folder / "data", []

    async def use(engine: Any) -> None:
        async with engine.start(SandboxSpec(base=(str(base),))) as sandbox:
            done = await sandbox.exec(Command(shell="head -c 300000 /dev/zero > more && wc -c < more"))
            assert done.text() == "300000\n" if done.ok else b"No space left" in done.stderr, done
            await sandbox.upload(base, "again")
            snapshot = await sandbox.snapshot()
            try:
                done = await engine.run(SandboxSpec(base=snapshot), Command(shell="cat data again/data | wc -c; ls"))
                assert done.text().split() == ["1000000", "again", "data", "more"], done
            finally:
                await snapshot.release()

    async with (
        nothing_is_left(cramped, state),
        open_docker(host=cramped.host, image=image, state_dir=state) as engine,
    ):
        for _ in range(TIMES):
            error = await failure_on_a_full_disk(use(engine), disk, chance, longest_s=1.0, deadline_s=END_S)
            if error is not None:
                failed.append(error)
            assert engine.statistics().alive == 0
        async with asyncio.timeout(END_S):
            await use(engine)
    assert failed


# -- the daemon itself


@pytest.fixture
def mortal() -> Iterator[Dockerd]:
    """A daemon that the test may kill."""
    try:
        with own_dockerd() as dockerd:
            yield dockerd
    except Unavailable as error:
        pytest.skip(f"no Docker engine: {error}")


async def work(engine: Any) -> None:
    """Starts, commands, snapshots without end."""
    while True:
        async with engine.start(SandboxSpec()) as sandbox:
            await sandbox.exec(Command(shell="echo x > f"))
            snapshot = await sandbox.snapshot()
            await engine.run(SandboxSpec(base=snapshot), Command(shell="cat f"))
            await snapshot.release()


async def test_a_daemon_that_is_killed_at_any_moment_is_an_error_and_what_it_kept_is_swept(
    mortal: Dockerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A daemon that is killed while it starts a container forgets its processes too; the rocklet ends them.
    monkeypatch.setattr("ale.sandbox.docker.engine.ALONE_S", 5.0)
    chance = random.Random(5)
    image = await import_rootfs(mortal, tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    # A containerd that is killed while it starts a container forgets its shim and the `runc init` below it. No API can
    # reach these, and nothing of the container runs in them.
    async with nothing_is_left(mortal, state, shims=False):
        for _ in range(TIMES):
            async with asyncio.timeout(END_S):
                with pytest.raises(SandboxError):
                    async with open_docker(host=mortal.host, image=image, state_dir=state) as engine:
                        working = asyncio.ensure_future(work(engine))
                        with suppress(TimeoutError):
                            async with asyncio.timeout(chance.uniform(0, 2)):
                                await asyncio.shield(working)
                        mortal.kill()
                        await asyncio.wait([working])
                        assert isinstance(working.exception(), SandboxError), working
            await asyncio.to_thread(mortal.start)
            async with open_docker(host=mortal.host, image=image, state_dir=state) as engine:
                done = await engine.run(SandboxSpec(), Command(shell="echo again"))
                assert done.text() == "again\n"
