"""The confined side of `evaluators._sandbox`: a script that locks itself up, then runs one program.

It is started with a bare interpreter and imports the standard library alone. Standard input holds a line with a secret
and the program; standard output gets `ready SECRET`, once the locks were tried and held, and then `passed SECRET` or
`failed SECRET`. Whatever does not answer so has not passed.

Three layers of Linux, none of which needs root or a helper: resource limits; Landlock, which leaves no file but
Python's own libraries readable and none writable; and seccomp, which leaves the system calls of `_ALLOWED`, none of
which makes a process, a thread, a socket or a signal.
"""

from __future__ import annotations

# Nothing that is slow to import: it starts once for every program.
import _socket
import ctypes
import errno
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MEBIBYTE = 2**20
OPEN_FILES = 32

# Numbers of x86-64, <asm/unistd_64.h>: reading files, memory, time, and facts about the process itself. Left out on
# purpose: fcntl and ioctl, which can make the kernel send signals, and prlimit64, with which root lifts limits.
_ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89,
    "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "getrandom": 318, "statx": 332, "rseq": 334,
    "faccessat2": 439,
}  # fmt: skip

_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(name: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, *values: object) -> None:
    _call("prctl", _LIBC.prctl(option, *values, *[ctypes.c_ulong(0)] * (4 - len(values))))


# --- limits --------------------------------------------------------------------------------------------------


def _limit(seconds: int, mebibytes: int) -> None:
    """Of this process, which cannot make another: seconds of processor time, and mebibytes of addresses."""
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds),  # the hard one: it ends by SIGKILL, which nobody can ignore
        resource.RLIMIT_AS: (mebibytes * MEBIBYTE,) * 2,
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
        resource.RLIMIT_MEMLOCK: (0, 0),
    }
    for limit, values in limits.items():
        resource.setrlimit(limit, values)


# --- files: Landlock -----------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# Bits of each version of the interface: rights over files, over TCP, and over what lies outside of the sandbox.
_FILE_BITS, _NET_BITS, _SCOPE_BITS = {1: 13, 2: 14, 3: 15, 5: 16}, {4: 2}, {6: 2}


def _bits(versions: dict[int, int], version: int) -> int:
    return (1 << max((bits for least, bits in versions.items() if least <= version), default=0)) - 1


def _readable() -> list[str]:
    """Folders of the standard library and of the shared libraries that it loads."""
    own = [os.path.dirname(os.__file__), *filter(os.path.isdir, sys.path), os.path.join(sys.base_prefix, "lib")]
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    return [path for path in dict.fromkeys(own + shared) if os.path.exists(path)]


def _lock_files() -> None:
    """No file can be opened from here on, but those below `_readable`, for reading."""
    version = _call("landlock", _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG))
    handled = struct.pack("QQQ", *(_bits(bits, version) for bits in (_FILE_BITS, _NET_BITS, _SCOPE_BITS)))
    size = 8 if version < 4 else 16 if version < 6 else 24  # an older kernel refuses fields that it does not know
    rules = _call("landlock", _LIBC.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(size), 0))
    for path in _readable():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        rule = struct.pack("=Qi", rights, place)
        _call("landlock", _LIBC.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0))
        os.close(place)
    _call("landlock", _LIBC.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)


# --- system calls: seccomp -----------------------------------------------------------------------------------

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: 32-bit word at an offset, compare, end
_KILL_PROCESS, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | 1, 0x7FFF0000  # the second answers EPERM
_X86_64 = 0xC000003E
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def _filter() -> bytes:
    """The BPF program: calls of another architecture kill, calls that are not listed are refused."""
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL_PROCESS)]
    code.append((_LOAD, 0, 0, _NUMBER))
    for number in _ALLOWED.values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _lock_calls() -> None:
    """From here on, a system call that is not in `_ALLOWED` fails."""
    code = ctypes.create_string_buffer(_filter())
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code)))
    _prctl(22, ctypes.c_ulong(2), ctypes.byref(program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# --- what is forbidden, tried ---------------------------------------------------------------------------------


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES)
    except ValueError:  # resource says so of EPERM
        return True
    return False


def _try_locks() -> None:
    """Raises RuntimeError for a lock that does not hold."""
    attempts: dict[str, Callable[[], object]] = {
        "a socket": lambda: _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM),
        "a process": os.fork,
        "a signal": lambda: os.kill(os.getppid(), 0),
        "a folder": lambda: os.listdir("/"),
        "a file": lambda: os.open("/proc/self/environ", os.O_RDONLY),
        "a new file": lambda: os.open("/tmp", os.O_TMPFILE | os.O_WRONLY),
        "a higher limit": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
    }
    for what, attempt in attempts.items():
        if not _refused(attempt):
            raise RuntimeError(f"{what} is not refused inside of it")


def _lock(seconds: int, mebibytes: int) -> None:
    _prctl(1, ctypes.c_ulong(9))  # PR_SET_PDEATHSIG, SIGKILL: nobody else would end a program that sleeps
    _limit(seconds, mebibytes)
    _prctl(38, ctypes.c_ulong(1))  # PR_SET_NO_NEW_PRIVS, without which the other two need root
    _lock_files()
    _lock_calls()
    _try_locks()


def _run(program: str) -> bool:
    """Whether a program runs to its end, as a module of its own without a file."""
    module = type(sys)("program")
    sys.modules["program"] = module  # dataclasses and pickle look for the module of a class
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException:  # SystemExit, too: whoever leaves early has not been tested
        return False
    return True


def main(seconds: int, mebibytes: int) -> None:
    """Lock up, run what standard input holds, and answer."""
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    answers, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        _lock(seconds, mebibytes)
    except Exception as error:
        os.write(answers, f"unlocked {error}".encode())
        os._exit(1)
    os.write(answers, b"ready " + secret + b"\n")
    passed = _run(program.decode())
    os.write(answers, (b"passed " if passed else b"failed ") + secret + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
