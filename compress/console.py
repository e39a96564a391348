"""How the command line talks: errors as one line and an exit code, progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from compress.errors import CompressError, ResourceExhausted

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from compress.run import Reporter


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Every failure as one line on stderr and its exit code; a traceback only under --debug."""
    _logging(debug)
    try:
        yield
    except (CompressError, MemoryError, OSError, KeyboardInterrupt) as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, KeyboardInterrupt):
            _fail("interrupted; run the same command again to resume", 130)
        if isinstance(error, CompressError):
            _fail(str(error), error.exit_code)
        full = isinstance(error, MemoryError) or error.errno in (12, 28, 122)
        code = ResourceExhausted.exit_code if full else CompressError.exit_code
        _fail(f"{type(error).__name__}: {error or 'out of memory'}", code)
    except Exception as error:
        if debug:
            raise
        _fail(f"internal error, {type(error).__name__}: {error} (--debug shows where)", CompressError.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"compress: {' '.join(message.split())}", file=sys.stderr)
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
    from compress.run import Reporter

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
