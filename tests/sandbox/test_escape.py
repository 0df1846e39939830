"""Attempts to get out of a local sandbox. Each asserts that it failed, and that the sandbox and a neighbour still work.

Whatever could leak leaks into a trap that the test itself set on loopback, never to another machine.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ale.errors import SandboxError
from ale.sandbox import Command, Completed, Limits, Mount, Sandbox, SandboxEngine, SandboxSpec

PYTHON = f"LD_LIBRARY_PATH=/.rocklet/lib /.rocklet/bin/python{sys.version_info.major}.{sys.version_info.minor} -I -S -c"
# Calls C functions without `ctypes`, which the rocklet's interpreter does not have; prints result and errno.
C_CALL = """
import _ctypes, sys
library = _ctypes.dlopen(None, 0)
def call(name, *arguments):
    result = _ctypes.call_function(_ctypes.dlsym(library, name), arguments)
    location = _ctypes.call_function(_ctypes.dlsym(library, "__errno_location"), ())
    return result
def attempt(name, *arguments):
    result = call(name, *arguments)
    _ctypes.call_function(_ctypes.dlsym(library, "perror"), (name.encode(),))
    print("got" if result >= 0 else "refused")
"""


@asynccontextmanager
async def prison(engine: SandboxEngine, spec: SandboxSpec | None = None) -> AsyncIterator[Sandbox]:
    """A sandbox to break out of; afterwards it and its neighbour must still work."""
    async with engine.start(SandboxSpec()) as neighbour, engine.start(spec or SandboxSpec()) as sandbox:
        await neighbour.exec(Command(shell="echo untouched > file; sleep 1000 > /dev/null 2>&1 & echo $! > pid"))
        yield sandbox
        assert (await sandbox.exec(Command(shell="echo alive"))).stdout == b"alive\n"
        assert (await neighbour.exec(Command(shell="cat file; kill -0 $(cat pid)"))).stdout == b"untouched\n"


async def shell(sandbox: Sandbox, line: str, timeout_s: float = 20) -> Completed:
    return await sandbox.exec(Command(shell=line, timeout_s=timeout_s))


def c_code(code: str) -> str:
    return f"{PYTHON} {shlex.quote(C_CALL + code)}"


async def test_host_directories_are_not_there(local: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    state = local.capabilities()["state"]
    async with prison(local) as sandbox:
        done = await shell(sandbox, "ls -A /")
        shown = set(done.text().split())
        assert shown <= {".rocklet", "app", "bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "tmp", "usr"}
        for path in (str(tmp_path), str(tmp_path / "secret"), state, "/root", "/home", "/var", "/run", "/sys", "/mnt"):
            assert (await shell(sandbox, f"ls {path}")).exit_code != 0, path


async def test_the_hosts_accounts_and_configuration_are_not_there(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, "ls /etc; cat /etc/passwd /etc/hosts")
        for name in ("shadow", "resolv.conf", "machine-id", "ssh", socket.gethostname()):
            assert name not in done.text().split(), name
        assert (await shell(sandbox, "hostname")).stdout.strip() != socket.gethostname().encode()


async def test_no_process_shows_the_hosts_environment(local: SandboxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_SECRET", "hunter2")
    async with prison(local) as sandbox:
        done = await shell(sandbox, "cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'")
    assert "HOST_SECRET" not in done.text()
    assert "hunter2" not in done.text()


@pytest.mark.parametrize("one_shot", [False, True])
async def test_a_command_has_no_descriptor_but_its_own_three(local: SandboxEngine, one_shot: bool) -> None:
    command = Command(shell="exec ls /proc/self/fd")
    if one_shot:
        done = await local.run(SandboxSpec(), command)
    else:
        async with prison(local) as sandbox:
            done = await sandbox.exec(command)
    assert done.text().split() == ["0", "1", "2", "3"]  # 3 is the directory that `ls` reads


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_the_hosts_loopback_is_out_of_reach(local: SandboxEngine, family: int, address: str) -> None:
    with socket.socket(family) as trap, socket.socket(family, socket.SOCK_DGRAM) as datagrams:
        trap.bind((address, 0))
        trap.listen()
        datagrams.bind((address, 0))
        for listener in (trap, datagrams):
            listener.setblocking(False)
        async with prison(local) as sandbox:
            tcp = await shell(sandbox, f"exec 3<>/dev/tcp/{address}/{trap.getsockname()[1]} && echo hello >&3")
            await shell(sandbox, f"echo hello > /dev/udp/{address}/{datagrams.getsockname()[1]}")
            assert tcp.exit_code != 0
        with pytest.raises(BlockingIOError):
            trap.accept()
        with pytest.raises(BlockingIOError):
            datagrams.recv(100)


async def test_there_is_no_interface_route_or_name_server(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        interfaces = await shell(sandbox, "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '")
        routes = await shell(sandbox, "tail -n +2 /proc/net/route; grep -v ' lo$' /proc/net/ipv6_route")
        name = await shell(sandbox, "getent hosts host.invalid")
    assert interfaces.text() == "lo\n"
    assert routes.stdout == b""
    assert name.exit_code != 0


async def test_an_abstract_unix_socket_of_the_host_is_out_of_reach(local: SandboxEngine) -> None:
    name = f"ale-trap-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind("\0" + name)
        trap.listen()
        trap.setblocking(False)
        address = b"\1\0\0" + name.encode()
        async with prison(local) as sandbox:
            code = f"attempt('connect', call('socket', 1, 1, 0), {address!r}, {len(address)})"
            done = await shell(sandbox, c_code(code))
        assert done.stdout == b"refused\n", done
        with pytest.raises(BlockingIOError):
            trap.accept()


@pytest.mark.parametrize("family", [16 + 1, 38, 40], ids=["packet", "alg", "vsock"])
async def test_sockets_past_the_network_namespace_cannot_be_made(local: SandboxEngine, family: int) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, c_code(f"attempt('socket', {family}, 2, 0)"))
    assert done.stdout == b"refused\n"


async def test_raw_sockets_cannot_be_made(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, c_code("attempt('socket', 2, 3, 1)"))
    assert done.stdout == b"refused\n"


@pytest.mark.parametrize(
    "call",
    [
        "'ptrace', 16, 1, 0, 0",
        "'unshare', 0x10000000",
        "'unshare', 0x20000",
        "'setns', 0, 0",
        "'mount', b'none', b'/tmp', b'tmpfs', 0, 0",
        "'umount2', b'/proc', 2",
        "'pivot_root', b'/tmp', b'/tmp'",
        "'chroot', b'/tmp'",
        "'syscall', 250, 0, 0",
        "'syscall', 321, 0, 0, 0",
        "'syscall', 425, 8, b'x' * 120",
        "'syscall', 298, b'x' * 120, 0, -1, -1, 0",
        "'syscall', 323, 0",
        "'open_by_handle_at', -100, b'x' * 64, 0",
        "'init_module', b'', 0, b''",
        "'mknod', b'/app/disk', 0o60666, 0x800",
        "'setuid', 0",
        "'setgid', 0",
        "'sethostname', b'x', 1",
        "'settimeofday', b'x' * 16, 0",
        "'reboot', 0x1234567",
        "'setpriority', 0, 0, -10",
    ],
)
async def test_privileged_calls_are_refused(local: SandboxEngine, call: str) -> None:
    if "'syscall'" in call and os.uname().machine != "x86_64":
        pytest.skip("call numbers of x86_64; test_seccomp covers the others")
    async with prison(local) as sandbox:
        done = await shell(sandbox, c_code(f"attempt({call})"))
    assert done.stdout == b"refused\n", done


async def test_a_process_has_no_capability_and_gains_none(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
    facts = dict(line.split(":\t") for line in done.text().splitlines())
    assert {int(value, 16) for name, value in facts.items() if name.startswith("Cap")} == {0}
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")


async def test_user_namespaces_cannot_be_nested(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        assert (await shell(sandbox, "unshare --user true")).exit_code != 0
        assert (await shell(sandbox, "unshare --user --map-root-user --net true")).exit_code != 0


async def test_everything_but_workspace_and_tmp_is_read_only(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        for folder in ("/", "/usr", "/usr/bin", "/etc", "/bin/", "/.rocklet", "/dev", "/proc", "/proc/sys/kernel"):
            assert (await shell(sandbox, f"touch {folder}/mine")).exit_code != 0, folder
        for file in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/oom_score_adj", "/bin/sh"):
            assert (await shell(sandbox, f"echo 1 >> {file}")).exit_code != 0, file
        assert (await shell(sandbox, "touch /app/mine /tmp/mine /dev/shm/mine")).ok


async def test_the_rocklet_cannot_be_killed_stopped_or_interrupted(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        for name in ("KILL", "STOP", "INT", "TERM", "CHLD", "USR1", "SEGV"):
            await shell(sandbox, f"kill -{name} 1")
        done = await shell(sandbox, "kill -KILL -1; echo unreached")
        assert done.signal == 9 or done.stdout == b"unreached\n"


async def test_the_rocklets_memory_descriptors_and_environment_are_closed(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        for look in (
            "ls /proc/1/fd",
            "cat /proc/1/mem",
            "cat /proc/1/environ",
            "ls /proc/1/map_files",
            "ls /proc/1/cwd/",
        ):
            done = await shell(sandbox, look)
            assert done.exit_code != 0, look
        done = await shell(sandbox, "for fd in $(seq 0 63); do echo x > /proc/1/fd/$fd && echo wrote $fd; done")
        assert b"wrote" not in done.stdout


async def test_frames_cannot_be_forged(local: SandboxEngine) -> None:
    forged = "\\021\\377\\377\\377\\177" * 20
    async with prison(local) as sandbox:
        # By `exec`: for a plain redirection bash itself would keep a descriptor 10.
        attack = f"(exec 1>&$fd && exec printf '{forged}') && echo wrote $fd"
        done = await shell(sandbox, f"exec 2> /dev/null; for fd in $(seq 3 255); do {attack}; done; exit 7")
    assert (done.exit_code, done.stdout) == (7, b"")


async def test_host_processes_cannot_be_signalled(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, f"kill -0 {os.getpid()}; ls /proc/{os.getpid()}")
        assert done.exit_code != 0
        seen = await shell(sandbox, "ls /proc | grep -c '^[0-9]'")
        assert int(seen.stdout) < 8


async def test_the_processes_of_other_sandboxes_are_neither_seen_nor_reached(local: SandboxEngine) -> None:
    async with prison(local) as sandbox, local.start(SandboxSpec()) as other:
        await shell(other, "sleep 4321.5 > /dev/null 2>&1 & echo $! > pid")
        assert b"4321.5" not in (await shell(sandbox, "cat /proc/*/cmdline")).stdout
        await shell(sandbox, "kill -KILL -1")
        assert (await shell(other, "kill -0 $(cat pid)")).ok


async def test_a_fork_bomb_is_contained(local: SandboxEngine) -> None:
    async with prison(local, SandboxSpec(limits=Limits(pids=32))) as sandbox:
        done = await shell(sandbox, "bomb() { bomb | bomb & }; bomb; sleep 1000", timeout_s=1)
        assert done.timed_out
        left = await shell(sandbox, "ls /proc | grep -c '^[0-9]'")
        assert int(left.stdout) < 8


async def test_a_process_tree_that_grows_while_it_is_killed_dies(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        hydra = "while :; do setsid sleep 1000 & sleep 0.001; done"
        hydra = f"({hydra}) & ({hydra}) & setsid bash -c 'while :; do sleep 1 & done' & wait"
        assert (await shell(sandbox, hydra, timeout_s=0.5)).timed_out
        left = await shell(sandbox, "ls /proc | grep -c '^[0-9]'")
        assert int(left.stdout) < 8


async def test_a_memory_bomb_dies_and_its_sandbox_lives(local: SandboxEngine) -> None:
    if not local.capabilities()["memory"].startswith("cgroup"):
        pytest.skip("no memory cgroup on this machine")
    async with prison(local, SandboxSpec(limits=Limits(memory_mb=64))) as sandbox:
        done = await shell(sandbox, "head -c 1000000000 /dev/zero | tail > /dev/null; echo ${PIPESTATUS[1]}")
        assert done.stdout == b"137\n"


async def test_the_workspace_and_tmp_cannot_fill_the_hosts_memory(local: SandboxEngine) -> None:
    if local.capabilities()["disk"].startswith("no"):
        pytest.skip("no disk limit on this machine")
    async with prison(local, SandboxSpec(limits=Limits(memory_mb=64, tmp_mb=8))) as sandbox:
        tmp = await shell(sandbox, "head -c 20000000 /dev/zero > /tmp/big; stat -c %s /tmp/big; rm /tmp/big")
        assert int(tmp.stdout) <= 8 * 1024 * 1024
        done = await shell(sandbox, "for i in $(seq 40); do head -c 4000000 /dev/zero > f$i || break; done")
        assert done.signal == 9  # the kernel found nothing to free but the sandbox itself
        assert b"memory" in done.stderr
        left = await shell(sandbox, "du -sm . | cut -f1; rm f*")
        assert int(left.stdout) <= 64


async def test_a_one_shot_run_that_fills_its_memory_is_killed(local: SandboxEngine) -> None:
    if local.capabilities()["disk"].startswith("no"):
        pytest.skip("no disk limit on this machine")
    fill = Command(shell="for i in $(seq 40); do head -c 4000000 /dev/zero > f$i || break; done; echo filled")
    done = await local.run(SandboxSpec(limits=Limits(memory_mb=64)), fill)
    assert done.signal == 9
    assert b"filled" not in done.stdout


async def test_a_sandbox_that_fills_its_memory_again_and_again_is_given_up(local: SandboxEngine) -> None:
    if local.capabilities()["disk"].startswith("no"):
        pytest.skip("no disk limit on this machine")
    async with local.start(SandboxSpec(limits=Limits(memory_mb=40))) as sandbox:
        fill = "for i in $(seq 20); do head -c 4000000 /dev/zero > $(mktemp -p .); done"
        for _ in range(4):
            assert (await shell(sandbox, fill)).signal == 9
        with pytest.raises(SandboxError, match="memory"):
            await shell(sandbox, fill)


async def test_an_army_of_zombies_and_orphans_is_reaped(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        for _ in range(3):
            await shell(sandbox, "for i in $(seq 40); do (setsid true &) ; done")
        left = await shell(sandbox, "ls /proc | grep -c '^[0-9]'")
        assert int(left.stdout) < 8


async def test_descriptors_run_out_for_the_command_alone(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, 'for i in $(seq 3 3000); do eval "exec $i</dev/null" || exit 9; done')
        assert done.exit_code != 0


async def test_nothing_survives_close(local: SandboxEngine) -> None:
    marker = f"{os.getpid()}.125"
    async with local.start(SandboxSpec()) as sandbox:
        await shell(
            sandbox, f"setsid nohup sleep {marker} > /dev/null 2>&1 & (setsid sleep {marker} &) > /dev/null 2>&1"
        )
        assert marker in host_command_lines()
    assert marker not in host_command_lines()


def host_command_lines() -> str:
    lines: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
            except OSError:
                continue
    return "\n".join(lines)


async def test_file_requests_resolve_links_inside(local: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    async with prison(local) as sandbox:
        await shell(sandbox, f"ln -s {tmp_path}/secret file; ln -s {tmp_path} folder; ln -s /proc/1/environ env")
        for path in ("file", "folder/secret", str(tmp_path / "secret"), "../../../" + str(tmp_path / "secret")):
            with pytest.raises(OSError):
                await sandbox.read_file(path)
        for path in ("file", "folder/new"):
            with pytest.raises(OSError):
                await sandbox.write_file(path, b"pwned")
    assert (tmp_path / "secret").read_text() == "hunter2"
    assert os.listdir(tmp_path) == ["secret"]


async def test_a_snapshot_of_hostile_names_and_modes_is_taken_and_removed(local: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "host").write_text("kept")
    hostile = (
        f"mkdir -p deep/er; touch deep/er/x; chmod 000 deep/er deep; ln -s {tmp_path} out; touch $'new\\nline' -- -rf"
    )
    async with prison(local) as sandbox:
        await shell(sandbox, hostile)
        snapshot = await sandbox.snapshot()
        layers = local.statistics().layers
        await snapshot.release()
    assert local.statistics().layers == layers - 1
    assert (tmp_path / "host").read_text() == "kept"


async def test_mounted_tests_cannot_be_changed(local: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "test.sh").write_text("exit 1")
    spec = SandboxSpec(mounts=(Mount(str(tmp_path), "/tests"),))
    attack = (
        "echo exit 0 > /tests/test.sh; rm -f /tests/test.sh; mv /tests /gone; chmod 777 /tests; bash /tests/test.sh"
    )
    done = await local.run(spec, Command(shell=attack))
    assert done.exit_code == 1
    assert (tmp_path / "test.sh").read_text() == "exit 1"


async def test_what_the_agent_left_running_cannot_touch_the_grading(local: SandboxEngine) -> None:
    lurking = "setsid sh -c 'while :; do echo cheat > /app/answer; done' > /dev/null 2>&1 &"
    async with prison(local) as sandbox:
        await shell(sandbox, lurking)
        snapshot = await sandbox.snapshot()
        spec = SandboxSpec(base=snapshot)
        check = Command(shell="rm -f answer; echo true > answer; for i in $(seq 200); do cat answer; done | sort -u")
        done = await local.run(spec, check)
        await snapshot.release()
    assert done.stdout == b"true\n"


async def test_a_one_shot_run_leaves_no_process(local: SandboxEngine) -> None:
    marker = f"{os.getpid()}.625"
    await local.run(SandboxSpec(), Command(shell=f"setsid nohup sleep {marker} & exit 0"))
    assert marker not in host_command_lines()


async def test_an_agent_that_stops_its_parent_is_ended_by_the_time_out(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        done = await shell(sandbox, "kill -STOP $$; echo unreached", timeout_s=0.3)
        assert done.timed_out
        once = await local.run(SandboxSpec(), Command(shell="kill -STOP $PPID; kill -STOP $$", timeout_s=0.3))
        assert once.timed_out


async def test_a_flood_from_the_background_starves_nobody(local: SandboxEngine) -> None:
    async with prison(local) as sandbox:
        await shell(sandbox, "yes & yes >&2 & true")
        results = await asyncio.gather(*(shell(sandbox, f"echo {i}") for i in range(8)))
        assert [done.text() for done in results] == [f"{i}\n" for i in range(8)]
        await shell(sandbox, "pkill yes")
