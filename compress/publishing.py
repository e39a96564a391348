"""Folders that are seen whole or not at all, whenever a process is killed.

A folder is filled under a temporary name and renamed. While it is filled, its writer holds a kernel lock on it
(flock), which ends with the process: a temporary folder that nobody holds is a leftover, and `sweep` removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".tmp"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled and published; whatever is left of it in the end is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, held = _create(folder)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def publish(temporary: Path, folder: Path, keep: bool = False) -> None:
    """Make a finished folder visible under its name, durably.

    keep: where the name is taken, leave what is there, as its bytes are the same; otherwise replace it. The old
    folder is moved aside in one go, so that no reader meets half of it.
    """
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    aside = _beside(folder)
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        if keep:
            shutil.rmtree(temporary)
            return
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside)
    _sync(folder.parent)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold an existing folder by the kernel's lock for a while; False, without it, where another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def sweep(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose writers are gone, and temporary files, which nobody may write."""
    for path in parent.glob(f".*{SUFFIX}"):
        with suppress(FileNotFoundError):  # its writer has just published it
            if path.is_file():
                path.unlink()
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _create(folder: Path) -> tuple[Path, int]:
    """An empty folder beside `folder` that this process holds, and the descriptor that holds it."""
    while True:
        temporary = _beside(folder)
        temporary.mkdir()
        with suppress(FileNotFoundError):  # swept between mkdir and flock: once more
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def _beside(folder: Path) -> Path:
    """A name of its own: process ids repeat across containers that share a disk."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{SUFFIX}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
