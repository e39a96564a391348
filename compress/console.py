"""How the command line talks: errors as one line and an exit code, progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from compress.errors import CompressError, Interrupted, ResourceExhausted, exit_code, interruption, one_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from compress.workbench import Reporter


PATIENCE = 4.0  # seconds for an orderly end; what is on disk is sound at any moment
_ENDING = (signal.SIGINT, signal.SIGTERM)


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM raise Interrupted; where that takes too long, or at a second one, just end."""
    for signum in _ENDING:
        signal.signal(signum, _end)


def _end(signum: int, frame: object) -> NoReturn:
    for other in _ENDING:
        signal.signal(other, _end_now)
    # The exception waits for a library's long call, and is lost in a callback from C.
    timer = threading.Timer(PATIENCE, os._exit, [128 + signum])
    timer.daemon = True
    timer.start()
    raise Interrupted(signum)


def _end_now(signum: int, frame: object) -> NoReturn:
    os._exit(128 + signum)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Every failure as one line on stderr and its exit code; a traceback only under --debug."""
    _logging(debug)
    try:
        yield
    except KeyboardInterrupt as error:
        _fail(one_line(error), exit_code(error))
    except Exception as error:
        if debug:
            raise
        if interruption(error):
            _fail(one_line(error), exit_code(error))
        known = isinstance(error, CompressError | OSError) or exit_code(error) == ResourceExhausted.exit_code
        text = one_line(error) if known else f"internal error, {one_line(error)} (--debug shows where)"
        _fail(text, exit_code(error))


def _fail(message: str, code: int) -> NoReturn:
    print(f"compress: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _logging(debug: bool) -> None:
    import logging

    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    if not debug:
        for name in ("transformers", "huggingface_hub", "onnxruntime", "gguf", "torch"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def reporter(quiet: bool) -> Iterator[Reporter]:
    """Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""
    from compress.workbench import Reporter

    if quiet:
        yield Reporter()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}", markup=False)
        with Progress(*columns, left, console=Console(stderr=True, highlight=False), transient=True) as bars:
            yield Reporter(say=lambda line: bars.console.print(line, markup=False), progress=_live(bars))
    else:
        yield Reporter(say=_plain_line, progress=_plain_progress())


@dataclass
class Pace:
    """How fast a part goes. A part is what stands before the colon of a label; falling back starts it anew."""

    clock: Callable[[], float] = time.monotonic
    part: str | None = None
    first: float = 0.0  # the fraction that was done when the part was first heard of
    done: float = 0.0
    started: float = 0.0

    def heard(self, label: str, fraction: float) -> bool:
        """Take note of a report; True where it begins a new part."""
        part = label.partition(":")[0]
        new = part != self.part or fraction < self.done
        if new:
            self.part, self.first, self.started = part, fraction, self.clock()
        self.done = fraction
        return new

    def left(self) -> str:
        """How long the rest of the part takes at its pace so far, e.g. "1 min 20 s left"; empty while unknown."""
        elapsed, gained = self.clock() - self.started, self.done - self.first
        if gained <= 0 or elapsed <= 0 or self.done >= 1:
            return ""
        minutes, seconds = divmod(round((1 - self.done) * elapsed / gained), 60)
        hours, minutes = divmod(minutes, 60)
        text = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"{text} left"


def _live(bars: Bars) -> Callable[[str, float], None]:
    task, pace = bars.add_task("", total=1.0, left=""), Pace()

    def update(label: str, fraction: float) -> None:
        if pace.heard(label, fraction):
            bars.reset(task)
        bars.update(task, description=label, completed=fraction, left=pace.left())

    return update


def _plain_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plain_progress(
    every_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    write: Callable[[str], None] = _plain_line,
) -> Callable[[str, float], None]:
    """A line now and then, so that a log tells a long part from a dead process."""
    last, pace = clock(), Pace(clock)

    def update(label: str, fraction: float) -> None:
        nonlocal last
        pace.heard(label, fraction)
        if clock() - last >= every_seconds:
            last, left = clock(), pace.left()
            write(f"    {label}  {fraction:.0%}{', ' if left else ''}{left}")

    return update


def print_json(value: Any) -> None:
    """One strict JSON object on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
