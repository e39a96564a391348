"""Running programs that a model wrote, each in a process of its own that has locked itself up.

See `evaluators._confined` for the locks. What they leave: a program can compute, sleep, read Python's own library and
learn that a file exists, all in limited memory and time; its output goes nowhere. It cannot read any other file (those
of the home folder and /etc/passwd included), write one, open a socket, make a process or a thread, or send a signal.
What they do not prevent: a program that is out to *pass* can deceive its own tests, which share its interpreter.
"""

from __future__ import annotations

import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Literal

from compress import permission
from compress.errors import RecipeError

Outcome = Literal["passed", "failed", "out of time", "killed"]
"""killed: by the sandbox or by its own crash, e.g. of a stack that overflowed."""

SECONDS, MEBIBYTES = 5, 512  # of processor time and of address space
WALL_CLOCK = 3  # times as long may a program take that waits
_CONFINED = Path(__file__).with_name("_confined.py")
_MOST_ANSWER = 4096  # bytes; what the script itself says is far shorter


class _Unlocked(Exception):
    """The sandbox could not be established; the message says why."""


@cache
def _problem() -> str:
    """Why this machine has no sandbox, found by running an empty program in one; empty where it has."""
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return f"it needs Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    try:
        outcome = _run("", SECONDS, MEBIBYTES)
    except (_Unlocked, OSError) as error:
        return str(error)
    return "" if outcome == "passed" else f"an empty program ends as {outcome!r} in it"


def version() -> str:
    """What decides how a program ends, besides the program: a part of cache keys."""
    return f"python {platform.python_version()}"


def require() -> None:
    """Raises RecipeError where programs may not run: they were not permitted, or there is no sandbox here."""
    permission.require_code_execution()
    if problem := _problem():
        raise RecipeError(
            f"runs programs that the model writes, and this machine cannot confine them: {problem}; use another "
            "machine (Linux 5.13 or later with Landlock and seccomp), or drop the check: they never run unconfined"
        )


def run(program: str, seconds: int = SECONDS, mebibytes: int = MEBIBYTES) -> Outcome:
    """How a program ends; raises RecipeError where it may not run, see `require`.

    seconds: of processor time. mebibytes: of address space, the interpreter's 20 or so included.
    """
    require()
    try:
        return _run(program, seconds, mebibytes)
    except _Unlocked as error:
        raise RecipeError(f"the sandbox of a program could not be established: {error}; nothing was run") from None


def _run(program: str, seconds: int, mebibytes: int) -> Outcome:
    secret = secrets.token_hex(16)
    bare = [sys.executable, "-s", "-S", "-P", "-B"]  # no site-packages, no folder of the script, no bytecode
    with tempfile.TemporaryFile() as given:
        given.write(f"{secret}\n{program}".encode())
        given.seek(0)
        with subprocess.Popen(
            [*bare, str(_CONFINED), str(seconds), str(mebibytes)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},  # sets iterate alike, and no secret is inherited
            cwd="/",
            start_new_session=True,
        ) as process:
            try:
                answer, late = _answer(process, time.monotonic() + WALL_CLOCK * seconds)
            finally:
                process.kill()
    ready, _, verdict = answer.decode(errors="replace").partition("\n")
    if ready != f"ready {secret}":
        started = "was not up in time" if late else f"ended with {process.returncode} before it was locked"
        raise _Unlocked(ready.removeprefix("unlocked ") or f"its interpreter {started}")
    if late or (process.returncode == -signal.SIGKILL and len(answer) < _MOST_ANSWER):  # the latter by RLIMIT_CPU
        return "out of time"
    if process.returncode != 0:
        return "killed"
    return "passed" if verdict == f"passed {secret}\n" else "failed"


def _answer(process: subprocess.Popen[bytes], end: float) -> tuple[bytes, bool]:
    """The first bytes that it writes, and whether it was still there at the time `end`."""
    assert process.stdout is not None
    found, stream = b"", process.stdout.fileno()
    while len(found) < _MOST_ANSWER:
        if not select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
            return found, True
        part = os.read(stream, _MOST_ANSWER - len(found))
        if not part:  # it has ended, or hides that it has not
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return found, True
            break
        found += part
    return found, False
