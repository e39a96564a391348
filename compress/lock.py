"""One process at a time in a run's folder: `.lock` says which, so that a dead one's can be taken over."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import Locked

FILE = ".lock"


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one of the same id.

    boot: the kernel's id of this boot. started: clock ticks from boot to the start of the process.
    """

    host: str
    boot: str
    pid: int
    started: int

    def may_live(self) -> bool:
        """Whether it runs. A process of another host, or container, cannot be seen from here: it may."""
        if self.host != socket.gethostname():
            return True
        return self.boot == _boot() and self.started == _started(self.pid)


def this_process() -> Process:
    """The calling process."""
    started = _started(os.getpid())
    assert started is not None
    return Process(socket.gethostname(), _boot(), os.getpid(), started)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold an existing folder; raises Locked at once where another process does."""
    me = this_process()
    _take(folder, me)
    try:
        yield
    finally:
        with guarded(folder):
            if _holder(folder) == me:
                (folder / FILE).unlink()


def _take(folder: Path, me: Process) -> None:
    with guarded(folder):
        other = _holder(folder)
        if other is not None and other.may_live():
            where = "" if other.host == me.host else f" on {other.host}"
            gone = "" if other.host == me.host else f", or remove {folder / FILE} if that machine is gone"
            raise Locked(f"{folder} is in use by process {other.pid}{where}; wait for it or stop it{gone}")
        temporary = folder / f"{FILE}.new"
        temporary.write_text(json.dumps(asdict(me)))
        temporary.replace(folder / FILE)


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Alone with the lock's file, for as long as it takes to look at it and to replace it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _holder(folder: Path) -> Process | None:
    """Whose lock it is; None where there is none, or one that a crash of the machine left empty."""
    try:
        found = json.loads((folder / FILE).read_text())
        return Process(**found)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)); None where no such process runs, or it only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])
