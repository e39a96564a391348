"""One exception per exit code, each carrying a message of one line: what, where, found, expected, remedy."""

from __future__ import annotations

import errno
import re
import signal


class CompressError(Exception):
    """An internal failure: what `compress` itself did wrong or could not finish (exit code 1)."""

    exit_code = 1


class NumericalError(CompressError):
    """A non-finite weight, activation, loss or Hessian; the message names the layer (exit code 1)."""


class NonFiniteModel(NumericalError):
    """A model that holds NaN or infinity, of which nothing can be proven; the message names the tensor (exit 4)."""

    exit_code = 4


class RecipeError(CompressError):
    """A recipe, option or input that cannot work, found before or while it is used (exit code 2)."""

    exit_code = 2


class GateFailed(CompressError):
    """At least one check is proven to exceed its margin (exit code 3)."""

    exit_code = 3


class GateInconclusive(CompressError):
    """No check failed, yet not every check is proven to pass (exit code 4)."""

    exit_code = 4


class UnsafeInput(CompressError):
    """Input that could execute code or escape its folder: pickles, remote code, symlinks (exit code 5)."""

    exit_code = 5


class ResourceExhausted(CompressError):
    """Disk or memory ran out (exit code 6)."""

    exit_code = 6


class Locked(CompressError):
    """Another live process works on the same run folder (exit code 7)."""

    exit_code = 7


class Corrupt(CompressError):
    """Stored bytes do not match their digest, or a file cannot be parsed (exit code 8)."""

    exit_code = 8


class NetworkError(CompressError):
    """A download that was asked for did not succeed (exit code 9)."""

    exit_code = 9


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end (exit code 128 + its number)."""

    def __init__(self, signum: int):
        name = signal.Signals(signum).name
        super().__init__(f"interrupted by {name}; run the same command again to resume")
        self.exit_code = 128 + signum


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As libraries say it that keep no errno: the system's own words, Rust's (safetensors, tokenizers), numpy's tofile.
_FULL_WORDS = re.compile(
    rf"os error ({'|'.join(map(str, _FULL))})\b|No space left on device|File too large|\d+ requested and \d+ written"
)


def disk_full(text: str) -> bool:
    """Whether a library's message says that a file could not grow.

    >>> disk_full("I/O error: No space left on device (os error 28)"), disk_full("4096 requested and 0 written")
    (True, True)
    """
    return _FULL_WORDS.search(text) is not None


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, CompressError | KeyboardInterrupt):
        return False
    return (isinstance(error, OSError) and error.errno in _FULL) or disk_full(str(error))


def interruption(error: BaseException) -> Interrupted | None:
    """The signal behind an exception, where there is one.

    C code that a signal interrupts, an import above all, may answer with an error of its own, whose cause it is.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, Interrupted):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def exit_code(error: BaseException) -> int:
    """The exit code that an exception ends the process with."""
    error = interruption(error) or error
    if isinstance(error, CompressError | Interrupted):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return ResourceExhausted.exit_code if memory or _disk_full(error) else CompressError.exit_code


def one_line(error: BaseException) -> str:
    """What went wrong, for people: the message of an error of ours, and the type of any other."""
    error = interruption(error) or error
    if isinstance(error, CompressError | Interrupted):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = str(Interrupted(signal.SIGINT))
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if _disk_full(error):
            text = f"the disk is full, or a limit on files is reached ({text}); nothing half-written is left; make room"
    return " ".join(text.split())
