"""The system calls that a sandbox is refused, as a classic BPF program for `bwrap --seccomp`.

Namespaces and dropped capabilities already forbid most of these; the filter takes their kernel code out of reach, so
that a bug in it is no way out. Everything else is allowed: a sandbox runs compilers, interpreters and servers.
"""

from __future__ import annotations

import platform
import struct

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
_CLONE, _CLONE3, _SOCKET, _IOCTL = (56, 220), (435, 435), (41, 198), (16, 29)

# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES = 0x80 | 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK (getifaddrs). Not AF_VSOCK, which reaches the hypervisor past the network
# namespace, nor AF_ALG, AF_PACKET and the protocols that are autoloaded as modules.
_FAMILIES = (1, 2, 10, 16)
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into the terminal of somebody else

_EPERM, _EAFNOSUPPORT, _ENOSYS = 1, 97, 38
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets in struct seccomp_data, low halves of little-endian arguments


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, k)


def filter_program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, for this machine or the one named (x86_64, aarch64)."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise SandboxUnavailable(f"no seccomp filter for the processor {machine!r}; use --sandbox unsafe-process")
    column, audit_arch = _ARCHITECTURES[machine]
    refuse = _op(_RET, _ERRNO | _EPERM)
    absent = _op(_RET, _ERRNO | _ENOSYS)

    # A program of another architecture would bring other numbers for the same calls.
    program = [_op(_LOAD, _ARCH), _op(_JEQ, audit_arch, 1, 0), absent, _op(_LOAD, _NR)]
    if machine == "x86_64":  # the x32 twins of every call
        program += [_op(_JGE, 0x40000000, 0, 1), absent]
    # clone3 hides its flags behind a pointer; "not there" makes the C library fall back to clone.
    program += [_op(_JEQ, _CLONE3[column], 0, 1), absent]
    program += [
        _op(_JEQ, _CLONE[column], 0, 4), _op(_LOAD, _ARG0), _op(_JSET, _NEW_NAMESPACES, 0, 1), refuse,
        _op(_RET, _ALLOW),
    ]  # fmt: skip
    families = [_op(_JEQ, family, len(_FAMILIES) - i, 0) for i, family in enumerate(_FAMILIES)]
    program += [_op(_JEQ, _SOCKET[column], 0, len(families) + 3), _op(_LOAD, _ARG0), *families]
    program += [_op(_RET, _ERRNO | _EAFNOSUPPORT), _op(_RET, _ALLOW)]
    program += [_op(_JEQ, _IOCTL[column], 0, 5), _op(_LOAD, _ARG1)]
    program += [_op(_JEQ, request, 1 - i, 1 if i else 0) for i, request in enumerate(_TERMINAL_INJECTION)]
    program += [refuse, _op(_RET, _ALLOW)]
    numbers = [calls[column] for group in DENIED.values() for calls in group.values()]
    denied = [number for number in numbers if number is not None]
    program += [_op(_JEQ, number, len(denied) - i, 0) for i, number in enumerate(denied)]
    program += [_op(_RET, _ALLOW), refuse]
    return b"".join(program)
