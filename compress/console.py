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
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from compress.errors import CompressError, Interrupted, exit_code, one_line

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
        known = isinstance(error, CompressError | MemoryError | OSError)
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
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            yield Reporter(say=lambda line: bars.console.print(line, markup=False), progress=_live(bars))
    else:
        yield Reporter(say=lambda line: print(line, file=sys.stderr, flush=True), progress=_plain_progress())


def _live(bars: Bars) -> Callable[[str, float], None]:
    task = bars.add_task("", total=1.0)
    current = ""

    def update(label: str, fraction: float) -> None:
        nonlocal current
        family = label.split(":")[0]
        if family != current or fraction == 0:
            bars.reset(task)
            current = family
        bars.update(task, description=label, completed=fraction)

    return update


def _plain_progress(every_seconds: float = 20.0) -> Callable[[str, float], None]:
    last = time.monotonic()

    def update(label: str, fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            print(f"    {label}  {fraction:.0%}", file=sys.stderr, flush=True)

    return update


def print_json(value: Any) -> None:
    """One strict JSON object on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
