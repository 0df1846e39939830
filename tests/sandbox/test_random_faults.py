"""Faults at random moments, 200 times each: kills of the engine, of the rocklet and of a process inside, full disks,
cancelled starts and commands, closing while a command runs. Processes, mounts, cgroups, descriptors, files and tasks
are counted before and after; nothing hangs, and no result is wrong."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ale.errors import SandboxError
from ale.sandbox import Command, Limits, SandboxSpec, open_engine
from ale.sandbox.quota import mount_tmpfs, unmount
from ale.sandbox.state import PREFIX, processes_on, sweep

from .counted import below, descriptors, failure_on_a_full_disk, groups_in, held_by, left_in, moment
from .mother import Mother

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

TIMES = 200
END_S = 30.0
ENDLESS = "setsid sleep 1000 > /dev/null 2>&1 & sleep 1000 & sleep 1000"
NAMES = "cat /proc/[0-9]*/comm"  # of what runs in the sandbox


@asynccontextmanager
async def nothing_is_left(engine: Any) -> AsyncIterator[None]:
    before, opened = held_by(engine), descriptors()
    yield
    assert held_by(engine) == before
    assert not descriptors() - opened


def rocklet_of(sandbox: Any) -> int:
    """The pid here of process 1 of a sandbox: the one whose parent is bwrap's monitor."""
    group = f"{sandbox.name}.{sandbox._incarnations - 1}"
    state = Path(sandbox._engine.capabilities()["state"])
    for pid in processes_on(state.name):
        with suppress(OSError):
            process = Path(f"/proc/{pid}")
            inside = f"/{state.name}/boxes/{group}/upper" in (process / "mountinfo").read_text()
            if inside and (process / "cmdline").read_bytes().startswith(b"/.rocklet"):
                return pid
    raise AssertionError(f"no rocklet runs in {sandbox.id}")


# -- cancellation


async def test_a_start_that_is_cancelled_at_any_moment_leaves_nothing(local: Any, tmp_path: Path) -> None:
    chance = random.Random(1)
    base = tmp_path / "base"
    base.mkdir()
    (base / "file").write_text("x")

    async def start() -> None:
        async with local.start(SandboxSpec(base=(str(base),))) as sandbox:
            await sandbox.exec(Command(shell=ENDLESS))

    async def fork() -> None:
        async with local.start(SandboxSpec(limits=Limits(disk_mb=4))) as sandbox, sandbox.fork(2) as (one, two):
            await asyncio.gather(one.exec(Command(shell=ENDLESS)), two.exec(Command(shell=ENDLESS)))

    async def once() -> None:
        await local.run(SandboxSpec(), Command(shell=ENDLESS))

    async with local.start(SandboxSpec(base=(str(base),))):
        pass  # one copy of the base stays with the engine
    async with nothing_is_left(local):
        for _ in range(TIMES):
            (base / "file").write_text(str(chance.random()))  # another content: it is copied again
            tasks = [asyncio.ensure_future(work()) for work in (start, fork, once)]
            for task in tasks:
                await moment(chance, 0.03)
                task.cancel()
            async with asyncio.timeout(END_S):
                results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results), results
            assert local.statistics().alive == 0


async def test_a_command_that_is_cancelled_at_any_moment_is_gone_and_its_sandbox_goes_on(local: Any) -> None:
    chance = random.Random(2)

    async def terminal(sandbox: Any) -> None:
        async with sandbox.terminal(Command(shell=ENDLESS)) as terminal:
            await terminal.wait(deadline_s=900)

    async with nothing_is_left(local), local.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        await session.exec(Command(shell="state=kept"))
        for number in range(TIMES):
            running = [
                asyncio.ensure_future(work)
                for work in (
                    sandbox.exec(Command(shell=f"echo {number} >> count; {ENDLESS}", timeout_s=900)),
                    session.exec(Command(shell=f"state=lost; {ENDLESS}", timeout_s=900)),
                    terminal(sandbox),
                )
            ]
            for task in running:
                await moment(chance, 0.01)
                task.cancel()
            async with asyncio.timeout(END_S):
                results = await asyncio.gather(*running, return_exceptions=True)
                assert all(isinstance(result, asyncio.CancelledError) for result in results), results
                seen = await session.exec(Command(shell=f"echo $state; {NAMES}"))
            assert seen.text().startswith("kept\n")
            assert "sleep" not in seen.text()
        counted = (await sandbox.exec(Command(shell="cat count 2> /dev/null"))).text().split()
        assert len(set(counted)) == len(counted)  # none ran twice


async def test_a_sandbox_closes_whatever_runs_in_it(local: Any) -> None:
    chance = random.Random(3)
    async with nothing_is_left(local):
        for _ in range(TIMES):
            async with local.start(SandboxSpec()) as sandbox:
                running = [asyncio.ensure_future(sandbox.exec(Command(shell=ENDLESS))) for _ in range(2)]
                await moment(chance, 0.02)
                async with asyncio.timeout(END_S):
                    await sandbox.close()
                    results = await asyncio.gather(*running, return_exceptions=True)
                assert all(isinstance(result, SandboxError) for result in results), results
            assert local.statistics().alive == 0


# -- what is killed


async def test_a_rocklet_that_is_killed_breaks_its_sandbox_alone(local: Any) -> None:
    chance = random.Random(4)
    async with nothing_is_left(local), local.start(SandboxSpec()) as neighbour:
        broken = local.statistics().broken

        async def write(sandbox: Any) -> None:
            while True:
                await sandbox.write_file("file", b"x" * 100_000)
                assert await sandbox.read_file("file") == b"x" * 100_000

        async def session(sandbox: Any) -> None:
            for number in range(1_000_000):
                assert (await sandbox.session().exec(Command(shell=f"echo {number}"))).text() == f"{number}\n"

        async def command(sandbox: Any) -> None:
            await sandbox.exec(Command(shell=ENDLESS, timeout_s=900))

        for number in range(1, TIMES + 1):
            async with local.start(SandboxSpec()) as sandbox:
                victim = rocklet_of(sandbox)
                running = [asyncio.ensure_future(work(sandbox)) for work in (write, session, command)]
                await moment(chance, 0.02)
                os.kill(victim, signal.SIGKILL)
                async with asyncio.timeout(END_S):
                    results = await asyncio.gather(*running, return_exceptions=True)
                    assert all(isinstance(result, SandboxError) for result in results), results
                    with pytest.raises(SandboxError, match="broken"):
                        await sandbox.exec(Command(shell="true"))
            assert local.statistics().broken == broken + number
            assert (await neighbour.exec(Command(shell="echo alive"))).text() == "alive\n"


async def test_a_process_inside_that_is_killed_is_what_its_command_says(local: Any) -> None:
    chance = random.Random(5)
    line = "echo x >> count; /bin/sh -c '/bin/sleep 1000; exit 5'; echo $?"
    ends = []
    async with nothing_is_left(local), local.start(SandboxSpec()) as sandbox:
        rocklet = rocklet_of(sandbox)
        while len(ends) < TIMES:
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
        lines = (await sandbox.exec(Command(shell="wc -l < count"))).text()
        assert int(lines) <= len(ends) + 5
    # The shell was killed; a child was, and the shell tells it; the program of a child was, and the child tells it.
    expected = {(signal.SIGKILL, None, ""), (None, 0, "137"), (None, 0, "5")}
    assert set(ends) == expected


ENGINE = """
import asyncio, random, sys
from pathlib import Path
from ale.sandbox import Command, Limits, SandboxSpec, open_engine
import ale.sandbox.local, ale.sandbox.pool, ale.sandbox.egress

async def live(engine, chance):
    while True:
        limits = Limits(disk_mb=4) if chance.random() < 0.3 else Limits()
        async with engine.start(SandboxSpec(limits=limits)) as sandbox:
            await sandbox.exec(Command(shell="echo x > file; setsid sleep 1000 > /dev/null 2>&1 &"))
            async with sandbox.fork(2) as (one, two):
                seen = await asyncio.gather(*(fork.exec(Command(shell="cat file")) for fork in (one, two)))
                assert [done.text() for done in seen] == ["x\\n", "x\\n"], seen

async def once(engine):
    while True:
        assert (await engine.run(SandboxSpec(), Command(shell="sleep 0.01; echo y"))).text() == "y\\n"

async def main(seed):
    chance = random.Random(seed)
    async with open_engine("local", state_dir=Path(sys.argv[1])) as engine:
        await asyncio.gather(live(engine, chance), live(engine, chance), once(engine))
"""


@pytest.fixture
def state(local: Any) -> Iterator[Path]:
    """A directory that the sandboxes' user can reach, beside the shared engine's own."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=Path(local.capabilities()["state"]).parent, prefix="ale-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def launchers_of(engine: int, state: Path) -> list[int]:
    found = []
    for folder in state.glob(f"{PREFIX}{engine}-*"):
        for pid in processes_on(folder.name):
            with suppress(FileNotFoundError, ProcessLookupError):  # a sandbox's process that has just ended
                if b"launcher.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
    return found


async def test_an_engine_that_is_killed_at_any_moment_leaves_nothing_that_the_sweep_does_not_take(state: Path) -> None:
    chance = random.Random(6)
    opened = descriptors()
    mothers = [Mother(ENGINE, str(state)) for _ in range(2)]
    try:
        for number in range(TIMES // 2):
            engines = [mother.bear(2 * number + side) for side, mother in enumerate(mothers)]
            for engine in engines:
                await moment(chance, 0.5)
                if chance.random() < 0.3:
                    os.kill(engine, signal.SIGSTOP)  # it does not see its launcher die
                    for launcher in launchers_of(engine, state):
                        os.kill(launcher, signal.SIGKILL)
                groups = groups_in(state)
                os.kill(engine, signal.SIGKILL)
            assert [mother.status_of_the_dead() for mother in mothers] == [-signal.SIGKILL] * 2
            groups |= groups_in(state)
            async with asyncio.timeout(END_S):
                await asyncio.to_thread(sweep, state)
            assert left_in(state, groups) == []
            if number % 25 == 0:
                async with open_engine("local", state_dir=state) as engine:
                    assert (await engine.run(SandboxSpec(), Command(shell="echo well"))).text() == "well\n"
    finally:
        for mother in mothers:
            mother.close()
    assert left_in(state, set()) == []
    assert not descriptors() - opened


# -- disks that are full


@pytest.fixture
def quotas(local: Any) -> Any:
    if local.capabilities()["disk quota"].startswith("no"):
        pytest.skip("this user may not mount")
    return local


async def test_a_workspace_that_fills_up_at_any_moment_is_an_error_of_the_write(quotas: Any) -> None:
    chance = random.Random(7)
    async with (
        nothing_is_left(quotas),
        quotas.start(SandboxSpec(limits=Limits(disk_mb=2))) as sandbox,
    ):
        await sandbox.write_file("kept", b"kept")
        refused = 0
        for number in range(TIMES):
            written: dict[str, bytes] = {}

            async def write(written: dict[str, bytes] = written, number: int = number) -> None:
                for part in range(40):
                    data = bytes([part]) * chance.randint(1, 200_000)
                    await sandbox.write_file(f"d{number}/{part}", data)
                    written[f"d{number}/{part}"] = data

            filling = sandbox.exec(Command(shell=f"head -c {chance.randint(1, 3_000_000)} /dev/zero > big"))
            async with asyncio.timeout(END_S):
                wrote, filled = await asyncio.gather(write(), filling, return_exceptions=True)
                assert wrote is None or (isinstance(wrote, OSError) and wrote.errno == 28), wrote
                refused += wrote is not None
                assert not isinstance(filled, BaseException)
                assert filled.ok or b"No space left" in filled.stderr, filled
                for name in chance.sample(sorted(written), min(3, len(written))):
                    assert await sandbox.read_file(name) == written[name]
                assert await sandbox.read_file("kept") == b"kept"
                assert (await sandbox.exec(Command(shell=f"rm -r d{number} big; ls"))).text() == "kept\n"
        assert refused > TIMES // 4


@pytest.fixture
def small_disk(state: Path, quotas: Any) -> Iterator[Path]:
    """A file system of its own, on which an engine has its directory."""
    disk = state / "disk"
    disk.mkdir()
    mount_tmpfs(disk, 96 << 20, 0, None)
    disk.chmod(0o755)
    yield disk
    unmount(disk)
    disk.rmdir()


async def test_an_engine_whose_disk_fills_up_at_any_moment_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    chance = random.Random(8)
    base = tmp_path / "base"
    base.mkdir()
    (base / "data").write_bytes(b"d" * 500_000)
    failed: list[BaseException] = []

    async def use(engine: Any) -> None:
        (base / "data").write_bytes(chance.randbytes(1) * 500_000)  # it is copied again
        async with engine.start(SandboxSpec(base=(str(base),))) as sandbox:
            done = await sandbox.exec(Command(shell="head -c 300000 /dev/zero > more && wc -c < more"))
            assert done.text() == "300000\n" if done.ok else b"No space left" in done.stderr, done
            await sandbox.upload(base, "again")
            assert len(await sandbox.read_file("again/data")) == 500_000
            async with sandbox.fork(2) as (one, two):
                await one.write_file("of-one", b"x" * 200_000)
                done = await two.exec(Command(shell="cat data | wc -c; ls"))
                assert done.text().split() == ["500000", "again", "data", "more"], done

    async with open_engine("local", state_dir=small_disk) as engine:
        await use(engine)  # one copy of the base stays with the engine
        async with nothing_is_left(engine):
            for number in range(TIMES):
                error = await failure_on_a_full_disk(use(engine), small_disk, chance, longest_s=0.04, deadline_s=END_S)
                if error is not None:
                    failed.append(error)
                assert engine.statistics().alive == 0
                if number % 10 == 0:
                    async with asyncio.timeout(END_S):
                        await use(engine)
    assert len(failed) > TIMES // 4
    assert left_in(small_disk, set()) == []
