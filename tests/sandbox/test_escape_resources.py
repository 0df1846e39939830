"""Attempts to use up what others need. Each fails, or ends at the sandbox itself; it and its neighbour go on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from ale.errors import SandboxError
from ale.sandbox import Command, Limits, SandboxSpec

FEW = 8  # processes in a sandbox with nothing left running, generously


async def processes(cell: Any) -> int:
    return int((await cell.shell("ls /proc | grep -c '^[0-9]'")).stdout)


def needs(backend: Any, what: str, means: str) -> None:
    if not backend.engine.capabilities()[what].startswith(means):
        pytest.skip(f"{what} is not limited by a {means} on this machine")


async def test_a_fork_bomb_is_contained(backend: Any) -> None:
    async with backend.prison(SandboxSpec(limits=Limits(pids=32))) as cell:
        assert (await cell.shell("bomb() { bomb | bomb & }; bomb; sleep 1000", timeout_s=1)).timed_out
        assert await processes(cell) < FEW


async def test_a_bomb_of_threads_is_contained(backend: Any) -> None:
    threads = """
import _thread
made = 0
try:
    while made < 200:
        _thread.start_new_thread(time.sleep, (30,)); made += 1
except RuntimeError:
    print("stopped", made < 40, flush=True)
posix._exit(0)
"""
    async with backend.prison(SandboxSpec(limits=Limits(pids=32))) as cell:
        assert (await cell.python(threads)).stdout == b"stopped True\n"


async def test_a_process_tree_that_grows_while_it_is_killed_dies(backend: Any) -> None:
    async with backend.prison() as cell:
        hydra = "while :; do setsid sleep 1000 & sleep 0.001; done"
        hydra = f"({hydra}) & ({hydra}) & setsid bash -c 'while :; do sleep 1 & done' & wait"
        assert (await cell.shell(hydra, timeout_s=0.5)).timed_out
        assert await processes(cell) < FEW


async def test_an_army_of_zombies_and_orphans_is_reaped(cell: Any) -> None:
    for _ in range(3):
        await cell.shell("for i in $(seq 40); do (setsid true &) ; done")
    assert await processes(cell) < FEW
    unreaped = """
for _ in range(30):
    if posix.fork() == 0:
        posix._exit(0)
"""
    assert (await cell.python(unreaped)).ok
    assert await processes(cell) < FEW


async def test_a_memory_bomb_dies_and_its_sandbox_lives(backend: Any) -> None:
    needs(backend, "memory", "cgroup")
    async with backend.prison(SandboxSpec(limits=Limits(memory_mb=64))) as cell:
        done = await cell.shell("head -c 1000000000 /dev/zero | tail > /dev/null; echo ${PIPESTATUS[1]}")
        assert done.stdout == b"137\n"


@pytest.mark.parametrize(
    "hoard",
    [
        "for _ in range(99): call('shmat', call('shmget', 0, 1 << 20, 0o1600), 0, 0)\nprint(len(bytearray(200 << 20)))",
        "for _ in range(200): posix.write(posix.memfd_create('x'), bytes(1 << 20))\nprint('kept')",
        "call('mlockall', 3)\nprint(len(bytearray(200 << 20)))",
    ],
    ids=["shared memory", "memory files", "locked memory"],
)
async def test_memory_hidden_in_the_kernel_counts(backend: Any, hoard: str) -> None:
    needs(backend, "memory", "cgroup")
    async with backend.prison(SandboxSpec(limits=Limits(memory_mb=64))) as cell:
        done = await cell.python(hoard)
        assert not done.ok
        assert done.stdout == b""


async def test_buffers_of_pipes_are_bounded(backend: Any) -> None:
    needs(backend, "memory", "cgroup")
    fill = """
filled = 0
try:
    while True:
        r, w = posix.pipe()
        posix.set_blocking(w, False)
        try:
            while True:
                filled += posix.write(w, bytes(65536))
        except BlockingIOError:
            pass
except OSError:
    print(filled < 60 << 20)
"""
    async with backend.prison(SandboxSpec(limits=Limits(memory_mb=64))) as cell:
        done = await cell.python(fill)
        assert done.stdout == b"True\n" or done.signal == 9


async def test_the_workspace_and_tmp_cannot_fill_the_hosts_memory(backend: Any) -> None:
    needs(backend, "disk", "the memory limit")
    async with backend.prison(SandboxSpec(limits=Limits(memory_mb=64, tmp_mb=8))) as cell:
        tmp = await cell.shell("head -c 20000000 /dev/zero > /tmp/big; stat -c %s /tmp/big; rm /tmp/big")
        assert int(tmp.stdout) <= 8 * 1024 * 1024
        done = await cell.shell("for i in $(seq 40); do head -c 4000000 /dev/zero > f$i || break; done")
        assert done.signal == 9  # the kernel found nothing to free but the sandbox itself
        assert b"memory" in done.stderr
        left = await cell.shell("du -sm . | cut -f1; rm f*")
        assert int(left.stdout) <= 64


async def test_a_one_shot_run_that_fills_its_memory_is_killed(backend: Any) -> None:
    needs(backend, "disk", "the memory limit")
    fill = Command(shell="for i in $(seq 40); do head -c 4000000 /dev/zero > f$i || break; done; echo filled")
    done = await backend.engine.run(SandboxSpec(limits=Limits(memory_mb=64)), fill)
    assert done.signal == 9
    assert b"filled" not in done.stdout


async def test_a_sandbox_that_fills_its_memory_again_and_again_is_given_up(backend: Any) -> None:
    needs(backend, "disk", "the memory limit")
    async with backend.engine.start(SandboxSpec(limits=Limits(memory_mb=40))) as sandbox:
        fill = Command(shell="for i in $(seq 20); do head -c 4000000 /dev/zero > $(mktemp -p .); done")
        for _ in range(4):
            assert (await sandbox.exec(fill)).signal == 9
        with pytest.raises(SandboxError, match="memory"):
            await sandbox.exec(fill)


async def test_empty_files_without_end_count_as_memory(backend: Any) -> None:
    needs(backend, "disk", "the memory limit")
    async with backend.prison(SandboxSpec(limits=Limits(memory_mb=40))) as cell:
        done = await cell.shell("mkdir d; cd d; seq 1 200000 | xargs touch; echo all")
        assert b"all" not in done.stdout


async def test_sparse_files_cannot_pass_the_file_limit(cell: Any) -> None:
    done = await cell.shell("truncate -s 10G sparse; fallocate -l 10G sparse; stat -c %s sparse; rm -f sparse")
    assert done.stdout.strip() in (b"", b"0")


async def test_descriptors_run_out_for_the_command_alone(cell: Any) -> None:
    done = await cell.shell('for i in $(seq 3 3000); do eval "exec $i</dev/null" || exit 9; done')
    assert done.exit_code != 0


@pytest.mark.parametrize("stream", ["", ">&2"])
async def test_a_flood_of_output_is_cut_and_ends_at_the_time_out(backend: Any, stream: str) -> None:
    limit = 4096
    async with backend.prison(SandboxSpec(limits=Limits(output_bytes=limit))) as cell:
        done = await cell.shell(f"yes flood {stream}", timeout_s=0.5)
        assert done.timed_out
        assert max(len(done.stdout), len(done.stderr)) <= limit
        assert done.stdout_dropped + done.stderr_dropped > limit


async def test_a_flood_from_the_background_starves_nobody(backend: Any) -> None:
    async with backend.prison() as cell:
        await cell.shell("yes & yes >&2 & true")
        results = await asyncio.gather(*(cell.shell(f"echo {i}") for i in range(8)))
        assert [done.text() for done in results] == [f"{i}\n" for i in range(8)]


async def test_a_busy_sandbox_does_not_starve_the_engine(backend: Any) -> None:
    busy = "for i in $(seq 16); do (while :; do :; done) & done; wait"
    async with backend.prison(SandboxSpec(limits=Limits())) as cell:
        spinning = asyncio.ensure_future(cell.shell(busy, timeout_s=2))
        began = time.monotonic()
        for _ in range(5):
            await cell.neighbour.exec(Command(shell="true"))
        assert time.monotonic() - began < 2
        assert (await spinning).timed_out


async def test_files_of_their_own_locks_and_watches_are_bounded(cell: Any) -> None:
    watches = """
count = 0
try:
    while count < 4000:
        if call("inotify_init1", 0) < 0:
            break
        count += 1
finally:
    print(count < 2000)
"""
    assert (await cell.python(watches)).stdout == b"True\n"
