"""The system calls that a sandbox is refused, as a classic BPF program for `bwrap --seccomp`.

Namespaces and dropped capabilities already forbid most of these; the filter takes their kernel code out of reach, so
that a bug in it is no way out. Everything else is allowed: a sandbox runs compilers, interpreters and servers.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence

from ale.errors import SandboxUnavailable

# name: (x86_64, aarch64); None where the architecture has no such call. Numbers: the kernel's syscall tables.
DENIED: dict[str, dict[str, tuple[int | None, int | None]]] = {
    "reading or steering another process": {
        "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
        "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    },
    "the kernel keyring, which no namespace divides": {
        "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    },
    "large and often exploited kernel interfaces": {
        "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262),
        "memfd_secret": (447, 447), "modify_ldt": (154, None), "uselib": (134, None), "lookup_dcookie": (212, 18),
        "nfsservctl": (180, 42), "vhangup": (153, 58),
    },
    "mounts and roots": {
        "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
        "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
        "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    },
    "files by handle, past every path": {"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    "new namespaces (clone is checked by its flags below)": {"unshare": (272, 97), "setns": (308, 268)},
    "the machine itself": {
        "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
        "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
        "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
        "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
        "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "iopl": (172, None),
        "ioperm": (173, None),
    },
}  # fmt: skip

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_CLONE, _CLONE3, _SOCKET, _IOCTL, _PERSONALITY = (56, 220), (435, 435), (41, 198), (16, 29), (135, 92)

# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES = 0x80 | 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
# Not AF_VSOCK, which reaches the hypervisor past the network namespace, nor AF_ALG, AF_PACKET and the families that
# are autoloaded as modules.
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
# Default, ICMP, TCP, UDP, ICMPv6. Not SCTP, DCCP, MPTCP and others, which programs do without.
_INTERNET_PROTOCOLS = (0, 1, 6, 17, 58)
_ROUTE = (0,)  # getifaddrs; not the netlink doors to the firewall, the crypto interface, audit and so on
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into the terminal of somebody else
# Linux, 32 bit, either with the old uname, without address randomisation (sanitizers), asking. Not READ_IMPLIES_EXEC.
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
# The rocklet, process 1, has the user of the commands, who may therefore take its limits and processor time away.
_BY_PID = {
    "prlimit64": (302, 261), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
}  # fmt: skip
# (kind, who); the value of `kind` that means every process of a user.
_BY_KIND = {"setpriority": ((141, 140), 2), "ioprio_set": ((251, 30), 3)}
_ROCKLET = 1

_EPERM, _ENOSYS, _EPROTONOSUPPORT, _EAFNOSUPPORT = 1, 38, 93, 97
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1, _ARG2, _ARG4 = (
    0,
    4,
    16,
    24,
    32,
    48,
)  # in struct seccomp_data, low halves of little-endian arguments


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, k)


_allow = _op(_RET, _ALLOW)


def _refuse(errno: int) -> bytes:
    return _op(_RET, _ERRNO | errno)


def _when(value: int, block: list[bytes]) -> list[bytes]:
    """Runs `block`, which decides, when the accumulator is `value`."""
    return [_op(_JEQ, value, 0, len(block)), *block]


def _choose(values: Sequence[int], found: bytes, otherwise: bytes) -> list[bytes]:
    """Decides by whether the accumulator is one of `values` (at most 255)."""
    return [*(_op(_JEQ, value, len(values) - i, 0) for i, value in enumerate(values)), otherwise, found]


def filter_program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, for this machine or the one named (x86_64, aarch64)."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise SandboxUnavailable(f"no seccomp filter for the processor {machine!r}; use --sandbox unsafe-process")
    column, audit_arch = _ARCHITECTURES[machine]
    refuse, absent = _refuse(_EPERM), _refuse(_ENOSYS)
    protocol = _refuse(_EPROTONOSUPPORT)

    # A program of another architecture would bring other numbers for the same calls.
    program = [_op(_LOAD, _ARCH), _op(_JEQ, audit_arch, 1, 0), absent, _op(_LOAD, _NR)]
    if machine == "x86_64":  # the x32 twins of every call
        program += [_op(_JGE, 0x40000000, 0, 1), absent]
    # clone3 hides its flags behind a pointer; "not there" makes the C library fall back to clone.
    program += _when(_CLONE3[column], [absent])
    program += _when(_CLONE[column], [_op(_LOAD, _ARG0), _op(_JSET, _NEW_NAMESPACES, 0, 1), refuse, _allow])
    internet = [_op(_LOAD, _ARG2), *_choose(_INTERNET_PROTOCOLS, _allow, protocol)]
    by_family = [
        *_when(_UNIX, [_allow]), *_when(_INET, internet), *_when(_INET6, internet),
        *_when(_NETLINK, [_op(_LOAD, _ARG2), *_choose(_ROUTE, _allow, protocol)]),
    ]  # fmt: skip
    program += _when(_SOCKET[column], [_op(_LOAD, _ARG0), *by_family, _refuse(_EAFNOSUPPORT)])
    program += _when(_IOCTL[column], [_op(_LOAD, _ARG1), *_choose(_TERMINAL_INJECTION, refuse, _allow)])
    program += _when(_PERSONALITY[column], [_op(_LOAD, _ARG0), *_choose(_PERSONALITIES, _allow, refuse)])
    for numbers in _BY_PID.values():
        program += _when(numbers[column], [_op(_LOAD, _ARG0), *_choose((_ROCKLET,), refuse, _allow)])
    for numbers, every in _BY_KIND.values():
        whom = [_op(_LOAD, _ARG1), *_choose((_ROCKLET,), refuse, _allow)]
        program += _when(numbers[column], [_op(_LOAD, _ARG0), *_when(every, [refuse]), *whom])
    denied = [calls[column] for group in DENIED.values() for calls in group.values()]
    program += _choose([number for number in denied if number is not None], refuse, _allow)
    return b"".join(program)


_CONNECT, _SENDTO = (42, 203), (44, 206)
_USER_NOTIFICATION = 0x7FC00000


def watch_numbers(machine: str) -> tuple[int, int]:
    """The call numbers of connect and sendto."""
    column, _ = _ARCHITECTURES[machine]
    return _CONNECT[column], _SENDTO[column]


def watch_program(machine: str | None = None) -> bytes:
    """A filter that reports connect, and sendto with an address. It refuses nothing, and stands on `filter_program`,
    which has refused the calls of every other architecture."""
    connect, sendto = watch_numbers(machine or platform.machine())
    report = _op(_RET, _USER_NOTIFICATION)
    addressed = [
        _op(_LOAD, _ARG4),
        _op(_JEQ, 0, 1, 0),
        report,
        _op(_LOAD, _ARG4 + 4),
        _op(_JEQ, 0, 1, 0),
        report,
        _allow,
    ]
    return b"".join([_op(_LOAD, _NR), *_when(connect, [report]), *_when(sendto, addressed), _allow])
