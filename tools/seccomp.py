"""The system-call filter of the python sandbox: classic BPF, assembled by hand for x86_64 and aarch64.

A deny-list over what user code never needs and what widens the kernel's attack surface, an allow-list of socket
families, and `ENOSYS` for every call newer than those reviewed here. A foreign architecture (or x32) is killed, so that
numbers can't be smuggled.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Collection, Iterable

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _AND, _RETURN = (
    0x20,
    0x15,
    0x25,
    0x35,
    0x45,
    0x54,
    0x06,
)
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH = 0, 4  # offsets into struct seccomp_data; argument i is at 16 + 8 i, its low half first
_X32_BIT = 0x40000000

# (x86_64, aarch64); 0 stands for "no such call there". Checked against the kernel's headers by the tests.
_DENIED = {
    # keyrings, tracing, other processes' memory
    **{
        "add_key": (248, 217),
        "request_key": (249, 218),
        "keyctl": (250, 219),
        "ptrace": (101, 117),
        "kcmp": (312, 272),
    },
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440)},
    **{"pidfd_getfd": (438, 438), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282)},
    # rings that would carry calls past this filter, and old sources of page-cache bugs
    **{
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "vmsplice": (278, 75),
    },
    # mounts and namespaces, old and new interface
    **{
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
        "chroot": (161, 51),
        "mount_setattr": (442, 442),
    },
    **{"open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431)},
    **{"fsmount": (432, 432), "fspick": (433, 433), "setns": (308, 268), "unshare": (272, 97)},
    **{
        "name_to_handle_at": (303, 264),
        "open_by_handle_at": (304, 265),
        "statmount": (457, 457),
        "listmount": (458, 458),
    },
    **{"fanotify_init": (300, 262), "fanotify_mark": (301, 263), "quotactl": (179, 60), "quotactl_fd": (443, 443)},
    # memory that no resource limit counts
    **{"shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197), "msgget": (68, 186)},
    **{"msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193)},
    **{"semtimedop": (220, 192), "semctl": (66, 191), "mq_open": (240, 180), "mq_unlink": (241, 181)},
    **{"mq_timedsend": (242, 182), "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "remap_file_pages": (216, 234)},
    **{"mbind": (237, 235), "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239)},
    # the machine itself
    **{"reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "kexec_load": (246, 104), "acct": (163, 89)},
    **{
        "kexec_file_load": (320, 294),
        "init_module": (175, 105),
        "finit_module": (313, 273),
        "delete_module": (176, 106),
    },
    **{"syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266)},
    **{"adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58)},
    **{"iopl": (172, 0), "ioperm": (173, 0), "modify_ldt": (154, 0), "uselib": (134, 0), "personality": (135, 92)},
    **{"lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "seccomp": (317, 277)},
}
_SPECIAL = {
    **{"socket": (41, 198), "socketpair": (53, 199), "clone": (56, 220), "clone3": (435, 435), "ioctl": (16, 29)},
    **{"mmap": (9, 222), "setsockopt": (54, 208)},
}
_NEWEST_REVIEWED = 462  # mseal; from 424 on both architectures share their numbers

UNIX, INET, INET6 = 1, 2, 10
"""Socket families. Never AF_VSOCK, which reaches the hypervisor."""
_BUFFER_SIZES = (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF and their FORCE forms
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_SHARED_ANONYMOUS = 0x21  # MAP_SHARED | MAP_ANONYMOUS: pages that stay while no process counts them
_HUGE_PAGES = 0x40000

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

Program = list[bytes]


def supported() -> bool:
    """Whether this machine's architecture has a filter."""
    return platform.machine() in _ARCHITECTURES


def build_filter(
    machine: str | None = None, *, needed: Collection[str] = (), families: Iterable[int] = (UNIX,)
) -> bytes:
    """The filter as `struct sock_filter[]` for `bwrap --seccomp`. `needed` names calls, of those that are denied or
    looked into, that are let through after all; `families` are those of sockets. Memory behind INET's grows by itself to
    10 MB a socket and counts for no process, so they are for those that need them. Raises `KeyError` for an unknown
    architecture."""
    arch, column = _ARCHITECTURES[machine or platform.machine()]
    program = _guard_architecture(arch) + _deny_newer()
    for name, body in _looked_into(families).items():
        program += _on(_SPECIAL[name][column], body) if name not in needed else []
    for number in sorted(row[column] for name, row in _DENIED.items() if row[column] and name not in needed):
        program += _on(number, [_fail(errno.EPERM)])
    return b"".join([*program, _ret(_ALLOW)])


def _looked_into(families: Iterable[int]) -> dict[str, Program]:
    family = _check_socket_family(families)
    return {
        "mmap": _check_mmap(), "ioctl": _check_ioctl(), "clone": _check_clone(), "clone3": [_fail(errno.ENOSYS)],
        "socket": family, "socketpair": family, "setsockopt": _check_socket_option(),
    }  # fmt: skip


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, k)


def _ret(action: int) -> bytes:
    return _op(_RETURN, action)


def _fail(number: int) -> bytes:
    return _ret(_ERRNO | number)


def _argument(index: int) -> bytes:
    return _op(_LOAD, 16 + 8 * index)


def _guard_architecture(arch: int) -> Program:
    """Kill what isn't `arch`, x32 included; leave the call number in the accumulator."""
    same = [_op(_LOAD, _ARCH), _op(_JUMP_EQUAL, arch, 1, 0), _ret(_KILL)]
    return [*same, _op(_LOAD, _NR), _op(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _ret(_KILL)]


def _deny_newer() -> Program:
    return [_op(_JUMP_GREATER, _NEWEST_REVIEWED, 0, 1), _fail(errno.ENOSYS)]


def _on(number: int, body: Program) -> Program:
    """`body` (which must return on every path) when the accumulator holds call `number`, else skip over it."""
    return [_op(_JUMP_EQUAL, number, 0, len(body)), *body]


def _any_equal(values: Iterable[int], then: bytes, otherwise: bytes) -> Program:
    jumps = list(values)
    tests = [_op(_JUMP_EQUAL, value, len(jumps) - i, 0) for i, value in enumerate(jumps)]
    return [*tests, otherwise, then]


def _check_socket_family(families: Iterable[int]) -> Program:
    return [_argument(0), *_any_equal(families, _ret(_ALLOW), _fail(errno.EAFNOSUPPORT))]


def _check_socket_option() -> Program:
    """What a socket may hold stays at the system's default (208 kB), by which the watchdog counts it."""
    level = [_argument(1), _op(_JUMP_EQUAL, 1, 1, 0), _ret(_ALLOW)]
    return [*level, _argument(2), *_any_equal(_BUFFER_SIZES, _fail(errno.EPERM), _ret(_ALLOW))]


def _check_clone() -> Program:
    return [_argument(0), _op(_JUMP_ANY_BIT, _NAMESPACE_FLAGS, 0, 1), _fail(errno.EPERM), _ret(_ALLOW)]


def _check_ioctl() -> Program:
    return [_argument(1), *_any_equal(_TERMINAL_INJECTION, _fail(errno.EPERM), _ret(_ALLOW))]


def _check_mmap() -> Program:
    huge = [_argument(3), _op(_JUMP_ANY_BIT, _HUGE_PAGES, 0, 1), _fail(errno.EPERM)]
    shared = [_op(_AND, _SHARED_ANONYMOUS), _op(_JUMP_EQUAL, _SHARED_ANONYMOUS, 0, 1), _fail(errno.EPERM)]
    return [*huge, *shared, _ret(_ALLOW)]
