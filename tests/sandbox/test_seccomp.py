"""The seccomp filter, run by a small interpreter of classic BPF for both processors."""

from __future__ import annotations

import struct

import pytest

from ale.errors import SandboxUnavailable
from ale.sandbox.seccomp import DENIED, filter_program

ALLOW, EPERM, ENOSYS, EPROTONOSUPPORT, EAFNOSUPPORT = 0x7FFF0000, 0x50001, 0x50026, 0x5005D, 0x50061
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE, CLONE3, SOCKET, IOCTL, READ = (
    {"x86_64": 56, "aarch64": 220},
    435,
    {"x86_64": 41, "aarch64": 198},
    {"x86_64": 16, "aarch64": 29},
    {"x86_64": 0, "aarch64": 63},
)
BOTH = pytest.mark.parametrize("machine", ["x86_64", "aarch64"])


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    padded = (*arguments, *([0] * (6 - len(arguments))))
    data = struct.pack("<IIQ6Q", number, arch or ARCH[machine], 0, *padded)
    program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x06:
            return k
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += if_true if taken else if_false


@BOTH
def test_every_listed_call_is_refused_and_its_neighbours_are_not(machine: str) -> None:
    column = list(ARCH).index(machine)
    denied = {calls[column] for group in DENIED.values() for calls in group.values()} - {None}
    special = {CLONE[machine], CLONE3, SOCKET[machine], IOCTL[machine]}
    for number in range(600):
        if number not in special:
            assert verdict(machine, number) == (EPERM if number in denied else ALLOW), number


@BOTH
def test_threads_and_processes_may_be_cloned_but_no_namespace(machine: str) -> None:
    assert verdict(machine, CLONE[machine], 0x3D0F00) == ALLOW  # pthread_create
    assert verdict(machine, CLONE[machine], 17) == ALLOW  # fork
    for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, CLONE[machine], flag | 17) == EPERM
    assert verdict(machine, CLONE3) == ENOSYS


@BOTH
def test_only_the_ordinary_socket_families_open(machine: str) -> None:
    opened = {family for family in range(50) if verdict(machine, SOCKET[machine], family) == ALLOW}
    assert opened == {1, 2, 10, 16}
    assert verdict(machine, SOCKET[machine], 40) == EAFNOSUPPORT


@BOTH
def test_internet_sockets_speak_the_ordinary_protocols_and_netlink_tells_of_interfaces_alone(machine: str) -> None:
    for family, protocols in ((2, {0, 1, 6, 17, 58}), (10, {0, 1, 6, 17, 58}), (16, {0})):
        spoken = {
            protocol for protocol in range(300) if verdict(machine, SOCKET[machine], family, 2, protocol) == ALLOW
        }
        assert spoken == protocols
    assert verdict(machine, SOCKET[machine], 2, 1, 132) == EPROTONOSUPPORT


@BOTH
def test_the_limits_and_the_scheduling_of_process_1_are_not_for_commands_to_set(machine: str) -> None:
    column = list(ARCH).index(machine)
    for numbers in ((302, 261), (142, 118), (144, 119), (314, 274), (203, 122)):
        assert verdict(machine, numbers[column], 1) == EPERM
        assert verdict(machine, numbers[column], 0) == verdict(machine, numbers[column], 7) == ALLOW
    for numbers, process, user in (((141, 140), 0, 2), ((251, 30), 1, 3)):
        assert verdict(machine, numbers[column], process, 1) == verdict(machine, numbers[column], user, 0) == EPERM
        assert verdict(machine, numbers[column], process, 0) == ALLOW


@BOTH
def test_a_personality_may_be_asked_for_but_not_make_data_executable(machine: str) -> None:
    number = {"x86_64": 135, "aarch64": 92}[machine]
    assert verdict(machine, number, 0xFFFFFFFF) == verdict(machine, number, 0x40000) == ALLOW
    assert verdict(machine, number, 0x400000) == EPERM


@BOTH
def test_typing_into_a_terminal_is_refused_and_other_ioctls_are_not(machine: str) -> None:
    assert verdict(machine, IOCTL[machine], 0, 0x5412) == verdict(machine, IOCTL[machine], 0, 0x541C) == EPERM
    assert verdict(machine, IOCTL[machine], 0, 0x5413) == ALLOW


def test_calls_of_a_foreign_architecture_are_not_there() -> None:
    assert verdict("x86_64", 4, arch=0x40000003) == ENOSYS  # i386, where 4 is write
    assert verdict("x86_64", 0x40000000 | 1) == ENOSYS  # x32


def test_an_unknown_processor_gets_a_clear_error() -> None:
    with pytest.raises(SandboxUnavailable, match="riscv64"):
        filter_program("riscv64")
