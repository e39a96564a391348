"""Facts of the machine that results and limits depend on."""

from __future__ import annotations

import platform
from pathlib import Path

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


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
