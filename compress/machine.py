"""Facts of the machine that results and limits depend on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # mallopt(3)
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
_RETURN = ((_MMAP_MAX, 2**16), (_TRIM_THRESHOLD, 2**27), (_TOP_PAD, 2**17), (_MMAP_THRESHOLD, 2**25))


def keep_freed_memory(keep: bool = True) -> None:
    """Let the memory of a tensor that is gone serve the next one, in this process, where the C library is glibc.

    It would give every piece of over 32 MB back to the kernel, which zeroes it page by page for the next tensor of that
    size: for logits over a vocabulary of 49,152 that takes a third of the time. `keep=False` gives pieces of 32 MB or
    more back, unless they fit into what is free already; smaller ones, and up to 128 MB behind the last of them, stay
    until `return_freed_memory`. So less stays between other pieces where blocks come and go. torch then
    asks for pages of 2 MB, which take the kernel less time where it gives them, unless it has made tensors before or
    the environment says otherwise; child processes do the same. A policy for programs, which libraries should leave to
    them.
    """
    if not keep:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in _KEEP if keep else _RETURN:
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Give what is free back to the kernel: pieces of it would otherwise stay with the process, between others."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # no other C library has it
        trim(0)


def peak_memory() -> int:
    """Most bytes of memory that this process held so far.

    By the kernel's account of the process alone, where it has one: getrusage counts what the parent held when it began.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # another system
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """The processor's name and those of its features that decide which kernels run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {k.strip(): v.strip() for k, v in facts.items()}
    flags = facts.get("flags", "").split()
    features = [f for f in _FEATURES if f in flags]
    return " ".join([facts.get("model name", "unknown"), *features])


def memory() -> tuple[int, int]:
    """Bytes of memory in all and available, within the limit of the control group where there is one."""
    import psutil

    found = psutil.virtual_memory()
    total, available = int(found.total), int(found.available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # another system, or "max"
        return total, available
    return min(total, limit), min(available, max(limit - used, 0))
