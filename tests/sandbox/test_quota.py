"""Quotas on the workspace and on processor time: enforced where they can be, refused by name where they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ale.errors import SandboxUnavailable
from ale.sandbox import Command, Limits, SandboxSpec
from ale.sandbox.cgroup import Cgroups
from ale.sandbox.enforcement import Enforcement
from ale.sandbox.quota import mount_tmpfs, unmount_below
from ale.sandbox.state import PREFIX, processes_on, shows_tools, sweep


@pytest.fixture
def quotas(local: Any) -> Any:
    if local.capabilities()["disk quota"].startswith("no"):
        pytest.skip("this user may not mount")
    return local


def quota_mounts() -> int:
    return Path("/proc/self/mountinfo").read_text().count("ale-quota")


async def test_a_full_workspace_is_an_error_of_the_write_and_nothing_else(quotas: Any) -> None:
    async with quotas.start(SandboxSpec(limits=Limits(disk_mb=4))) as sandbox:
        full = await sandbox.exec(Command(shell="head -c 9000000 /dev/zero > big"))
        assert b"No space left" in full.stderr
        left = await sandbox.exec(Command(shell="stat -c %s big; rm big; echo fits > small; cat small"))
    size, text = left.text().split()
    assert 3 << 20 < int(size) <= 4 << 20
    assert text == "fits"


async def test_files_run_out_at_their_number(quotas: Any) -> None:
    async with quotas.start(SandboxSpec(limits=Limits(inodes=100))) as sandbox:
        full = await sandbox.exec(Command(shell="for i in $(seq 200); do : > f$i || break; done; ls | wc -l"))
    assert 90 <= int(full.stdout) <= 100
    assert b"No space left" in full.stderr


async def test_a_workspace_with_a_quota_is_snapshot_and_forked_and_goes(quotas: Any) -> None:
    before = quota_mounts()
    async with quotas.start(SandboxSpec(limits=Limits(disk_mb=8))) as sandbox:
        await sandbox.exec(Command(shell="echo one > file; mkdir folder"))
        snapshot = await sandbox.snapshot()
        await sandbox.exec(Command(shell="echo two > file"))
        async with quotas.start(SandboxSpec(base=snapshot, limits=Limits(disk_mb=8))) as other:
            assert (await other.exec(Command(shell="cat file; ls -d folder"))).stdout == b"one\nfolder\n"
        assert (await sandbox.exec(Command(shell="cat file"))).stdout == b"two\n"
        await snapshot.release()
    assert quota_mounts() == before


def test_mounts_of_a_killed_engine_are_swept_and_make_no_process_its_own(quotas: Any, tmp_path: Path) -> None:
    dead = tmp_path / f"{PREFIX}999999999-1-dead"
    box = dead / "boxes" / "1.0"
    box.mkdir(parents=True)
    mount_tmpfs(box, 4096, 10, None)
    try:
        assert dead.name in Path("/proc/self/mountinfo").read_text()
        assert not shows_tools(Path("/proc/self"), dead.name)
        assert processes_on(dead.name) == []  # the sweep kills these: never one that only sees the mount
        assert sweep(tmp_path) == [dead.name]
    finally:
        unmount_below(tmp_path)
    assert not dead.exists()


async def test_a_share_of_a_processor_is_kept_to(local: Any) -> None:
    if local.capabilities()["cpu share"].startswith("no"):
        pytest.skip("no cpu controller on this machine")
    spin = "import time\nend = time.monotonic() + 1.0\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    python = local._interpreter.argv[:3]
    async with local.start(SandboxSpec(limits=Limits(cpus=0.2))) as sandbox:
        done = await sandbox.exec(Command(argv=(*python, "-c", spin), env=local._interpreter.env))
    assert float(done.stdout) < 0.45


def test_what_cannot_be_enforced_is_refused_by_name() -> None:
    nothing = Enforcement(Cgroups())
    nothing.check(Limits())
    for limits, field in (
        (Limits(cpus=1), "Limits.cpus"),
        (Limits(disk_mb=1), "Limits.disk_mb"),
        (Limits(inodes=1), "Limits.inodes"),
    ):
        with pytest.raises(SandboxUnavailable, match=field):
            nothing.check(limits)
    told = nothing.capabilities(in_memory=True)
    assert told["disk quota"].startswith("no")
    assert told["cpu share"].startswith("no")
