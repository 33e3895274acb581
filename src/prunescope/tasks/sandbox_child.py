"""The other side of `sandbox.py`: confines its own process, then runs the program it reads from its standard input.

Standard library only; started as ``python -I -c``, so that it does not see the package. Layers, each used where it is to be had:

- ``limits``: rlimits on processor time, address space, file size (0: not a byte to a file), open files, core dumps, and processes
  (which do not bind root).
- ``namespace``: a network namespace with no device that is up, where the kernel lets this user make one.
- ``nobody``: root becomes nobody, if nobody can read the Python library.
- ``seccomp`` (Linux on x86-64): a list of system calls that a program may make; all others fail with EPERM. Not among them: any that makes a
  process or thread, a socket, a new program image, opens a file for writing, makes, renames or removes one, sends a signal, or raises a limit. The kernel
  holds to it, root or not, whatever the program does.
- ``audit``: Python's own events for the same things are refused. Stops mistakes everywhere; determined code gets round it.
"""

import ctypes
import os
import struct
import sys
from typing import Any

# read write close fstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn ioctl pread64 readv writev access pipe
# select sched_yield mremap madvise dup dup2 nanosleep getpid exit uname fcntl getcwd readlink gettimeofday getrlimit getrusage sysinfo times
# getuid getgid geteuid getegid getppid sigaltstack gettid futex sched_getaffinity getdents64 clock_gettime clock_getres
# clock_nanosleep exit_group newfstatat readlinkat faccessat set_robust_list pipe2 getrandom membarrier statx rseq stat lstat faccessat2
_ALLOWED = [
    0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 21, 22, 23, 24, 25, 28, 32, 33, 35, 39, 60, 63, 72, 79, 89, 96, 97, 98, 99,
    100, 102, 104, 107, 108, 110, 131, 186, 202, 204, 217, 228, 229, 230, 231, 262, 267, 269, 273, 293, 318, 324, 332, 334, 4, 6, 439,
]  # fmt: skip
_OPEN, _OPENAT = 2, 257
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_TMPFILE", 0)
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
_NOBODY = 65534


def limits(cpu_seconds: int, memory: int) -> None:
    import resource

    for name, value in (
        ("CPU", cpu_seconds),
        ("AS", memory),
        ("FSIZE", 0),
        ("NOFILE", 64),
        ("CORE", 0),
        ("NPROC", 0),
    ):
        if hasattr(resource, f"RLIMIT_{name}"):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def namespace() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    user, net = 0x10000000, 0x40000000
    return bool(libc.unshare(net if os.geteuid() == 0 else user | net) == 0)


def nobody() -> bool:
    if os.geteuid() != 0:
        return False
    os.seteuid(_NOBODY)
    try:
        for path in filter(os.path.isdir, sys.path):
            os.listdir(path)  # noqa: PTH208 (pathlib's own is lazy)
        with open(os.__file__):  # noqa: PTH123
            pass
    except OSError:
        return False
    finally:
        os.seteuid(0)
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    return True


def seccomp() -> bool:
    """Install the filter. x86-64 only: the numbers above are that machine's."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return False

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, greater, masked, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [op(load, 4), op(equal, 0xC000003E, 1, 0), op(give, _KILL)]  # another machine's calls
    program += [op(load, 0), op(greater, 0x40000000, 0, 1), op(give, _KILL)]  # the x32 ones
    for number, argument in ((_OPEN, 1), (_OPENAT, 2)):
        program += [op(equal, number, 0, 4), op(load, 16 + 8 * argument), op(masked, _WRITES & ~0x10000, 1, 0)]
        program += [op(give, _ALLOW), op(give, _EPERM)]
    for number in _ALLOWED:
        program += [op(equal, number, 0, 1), op(give, _ALLOW)]
    program.append(op(give, _EPERM))
    code = ctypes.create_string_buffer(b"".join(program))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # no new privileges
        return False
    return bool(libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(whole)), 0, 0) == 0)


_REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.startfile", "os.chflags", "shutil.",
    "ctypes.", "signal.pthread_kill", "pty.", "mmap.", "tempfile.", "sqlite3.", "_thread.start", "resource.",
)  # fmt: skip


def audit(native: bool) -> bool:
    """``native``: whether native code may be reached (numpy does), since the kernel holds it."""

    def hook(event: str, details: Any) -> None:
        if event.startswith(_REFUSED) and not (native and event.startswith("ctypes.")):
            raise PermissionError(f"{event} is refused")
        if event == "open" and isinstance(details[2], int) and details[2] & _WRITES & ~0x10000:
            raise PermissionError("writing is refused")
        if not native and event == "import" and details[0] in ("ctypes", "_ctypes"):
            raise PermissionError("ctypes is refused")

    sys.addaudithook(hook)
    return True


def main() -> None:
    out = int(sys.argv[1])
    say = os.write
    nonce, cpu_seconds, memory, without = sys.stdin.buffer.readline().decode().split()
    program = sys.stdin.buffer.read().decode("utf-8", "replace")
    sys.argv = [""]
    used = ["limits"]
    for layer in (namespace, nobody):  # before the limits and the filter, which would forbid them
        if layer.__name__ not in without and layer():
            used.append(layer.__name__)
    limits(int(cpu_seconds), int(memory))
    if "seccomp" not in without and seccomp():
        used.append("seccomp")
    if "audit" not in without and audit("seccomp" in used):
        used.append("audit")
    say(out, f"layers {','.join(used)}\n".encode())
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        say(out, f"failed {type(error).__name__}\n".encode())
        os._exit(1)
    say(out, f"passed {nonce}\n".encode())
    os._exit(0)


main()
