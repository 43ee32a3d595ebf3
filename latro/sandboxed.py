"""Run by `latro.sandbox` in a process of its own: gives up what a program under test needs not have, and runs it.

The standard library alone. Standard input is the program. A pipe takes what could not be given up and, once the
program has run to its end, a token that it has not seen. What is given up cannot be had back: limits are hard ones,
capabilities are dropped, Landlock and seccomp are for the rest of the process.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types

# Of x86_64 and of aarch64, by what they are for.
FORBIDDEN = {
    "network": ((41, 42, 49, 53), (198, 203, 200, 199)),  # socket connect bind socketpair
    "processes": ((56, 435, 57, 58, 59, 322), (220, 435, 221, 281)),  # clone clone3 fork vfork execve execveat
    # kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal pidfd_open pidfd_getfd ptrace
    # process_vm_readv process_vm_writev setpriority sched_setaffinity setrlimit prlimit64
    "other processes": (
        (62, 200, 234, 129, 297, 424, 434, 438, 101, 310, 311, 141, 203, 160, 302),
        (129, 130, 131, 138, 240, 424, 434, 438, 117, 270, 271, 140, 122, 164, 261),
    ),
    # chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat, and of attributes
    # set, lset, fset, remove, lremove, fremove, setat, removeat: Landlock lets them be
    "attributes": (
        (90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 463, 466),
        (52, 53, 452, 55, 54, 88, 5, 6, 7, 14, 15, 16, 463, 466),
    ),
    # unshare setns mount umount2 shmget semget msgget mq_open memfd_create add_key request_key keyctl io_uring_setup
    # bpf perf_event_open userfaultfd
    "kernel": (
        (272, 308, 165, 166, 29, 64, 68, 240, 319, 248, 249, 250, 425, 321, 298, 323),
        (97, 268, 40, 39, 194, 190, 186, 180, 279, 217, 218, 219, 425, 280, 241, 282),
    ),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # which of the two, and its AUDIT_ARCH
X32 = 0x40000000  # system calls of x86_64 by other numbers

EXECUTE, WRITE, MAKE_CHAR, MAKE_BLOCK = 1 << 0, 1 << 1, 1 << 6, 1 << 11
CHANGES = WRITE | sum(1 << bit for bit in range(4, 13))  # remove and make, of every kind
REFER, TRUNCATE = 1 << 13, 1 << 14  # since the second and the third version of Landlock


def main() -> None:
    report, token, limits = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    del sys.argv[1:]
    program = sys.stdin.buffer.read().decode()
    missing = give_up(limits)
    os.write(report, json.dumps(missing).encode() + b"\n")
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # where dataclasses look for it
    exec(compile(program, "solution", "exec"), module.__dict__)
    sys.stdout.flush()
    os.write(report, token.encode())
    os._exit(0)  # without what the program left to be done at exit


def give_up(limits: dict[str, int]) -> list[str]:
    """What of it could not be given up, for want of an operating system that takes it."""
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))
    if sys.platform != "linux":
        return ["files", "network", "processes"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # no_new_privs
    drop_capabilities(libc)
    found = [] if keep_to(libc, os.getcwd()) else ["files"]
    return found + ([] if forbid(libc) else ["network", "processes"])


def drop_capabilities(libc: ctypes.CDLL) -> None:
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def keep_to(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock: nothing is changed but below this folder, and nothing is executed."""
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    changes = CHANGES | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = libc.syscall(create, struct.pack("Q", changes | EXECUTE), ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    here = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    allowed = struct.pack("=Qi", changes & ~MAKE_CHAR & ~MAKE_BLOCK, here)
    done = not libc.syscall(add, rules, 1, allowed, 0) and not libc.syscall(restrict, rules, 0)
    os.close(here)
    os.close(rules)
    return bool(done)


def forbid(libc: ctypes.CDLL) -> bool:
    """seccomp: these system calls fail with EPERM."""
    if platform.machine() not in MACHINES:
        return False
    column, machine = MACHINES[platform.machine()]
    calls = [number for numbers in FORBIDDEN.values() for number in numbers[column]]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    n = len(calls)
    code = [
        (load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, n + 1, 0, X32),
        *((equal, n - i, 0, call) for i, call in enumerate(calls)),
        (give, 0, 0, allow), (give, 0, 0, refuse),
    ]  # fmt: skip
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    return not libc.prctl(22, 2, program, 0, 0)


if __name__ == "__main__":
    main()
