"""Where cgroups may be made, read off files like the kernel's."""

from __future__ import annotations

from pathlib import Path

from ale.sandbox.cgroup import Cgroups, Parents, find_parents, make_cgroups
from ale.sandbox.enforcement import Enforcement
from ale.sandbox.port import Limits


def test_v1_and_v2_groups_of_this_process_are_found_under_their_mounts(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("5:memory:/box/a\n4:cpu,pids:/\n0::/user.slice/x\n")
    (tmp_path / "mountinfo").write_text(
        "30 1 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "31 1 0:2 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,cpu,pids\n"
        "32 1 0:3 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "33 1 0:4 / / rw - ext4 /dev/sda rw\n"
    )
    found = find_parents(tmp_path)
    assert found.memory_v1 == (Path("/sys/fs/cgroup/memory/box/a"),)
    assert found.pids_v1 == (Path("/sys/fs/cgroup/pids"),)
    assert found.v2[0] == Path("/sys/fs/cgroup/unified/user.slice/x")
    assert found.v2[-1] == Path("/sys/fs/cgroup/unified")


def test_a_mount_that_shows_a_part_of_the_hierarchy_is_entered_at_the_right_depth(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("5:memory:/docker/abc/inner\n")
    (tmp_path / "mountinfo").write_text("30 1 0:1 /docker/abc /mnt/memory rw - cgroup cgroup rw,memory\n")
    assert find_parents(tmp_path).memory_v1 == (Path("/mnt/memory/inner"),)


def test_what_cannot_be_made_is_not_claimed(tmp_path: Path) -> None:
    # Plain directories: no controller files appear in what is made there.
    made = make_cgroups("ale-sandbox-x", None, Parents((tmp_path,), (tmp_path,), (tmp_path,)))
    assert made == Cgroups()
    assert not list(tmp_path.iterdir())
    told = Enforcement(made).capabilities(in_memory=True)
    assert "each process by itself" in told["memory"]
    assert told["disk"].startswith("no")


def test_without_cgroups_resource_limits_stand_in() -> None:
    import resource

    limits = Enforcement(Cgroups()).resource_limits(Limits(memory_mb=100, pids=10))
    assert limits[resource.RLIMIT_AS] == 100 * 1024 * 1024
    assert limits[resource.RLIMIT_NPROC] >= 10
    with_groups = Enforcement(Cgroups((), {"memory": "cgroup v2", "pids": "cgroup v2"})).resource_limits(Limits())
    assert resource.RLIMIT_AS not in with_groups
    assert resource.RLIMIT_NPROC not in with_groups
