"""One exception per exit code, each carrying a message of one line: what, where, found, expected, remedy."""

from __future__ import annotations

import errno
import signal


class CompressError(Exception):
    """An internal failure: what `compress` itself did wrong or could not finish (exit code 1)."""

    exit_code = 1


class NumericalError(CompressError):
    """A non-finite weight, activation, loss or Hessian; the message names the layer (exit code 1)."""


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


_FULL = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)


def exit_code(error: BaseException) -> int:
    """The exit code that an exception ends the process with."""
    if isinstance(error, CompressError | Interrupted):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _FULL)
    return ResourceExhausted.exit_code if full else CompressError.exit_code


def one_line(error: BaseException) -> str:
    """What went wrong, for people: the message of an error of ours, and the type of any other."""
    if isinstance(error, CompressError | Interrupted):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = str(Interrupted(signal.SIGINT))
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text.split())
