"""A process per artifact: it opens the model in its runtime, times it, and tells its own peak of memory.

Controller and process exchange one line of JSON each way; whatever a library prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import BaseModel, ConfigDict

from compress.errors import CompressError, ResourceExhausted, exit_code, one_line
from compress.machine import return_freed_memory

if TYPE_CHECKING:
    from compress.interfaces import LanguageModel

_CODE = "from compress.bench import process; process.serve()"


class Round(BaseModel):
    """What one round measured. peak_bytes: beyond what the process held before the model was opened."""

    model_config = ConfigDict(frozen=True)

    load_seconds: float
    prefill_seconds: float
    step_seconds: list[float]
    peak_bytes: int


class Worker:
    """The controller's end of a process."""

    def __init__(self, spec: str, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.spec = spec
        self.runtime = self.compute = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, spec, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def prepare(self, tokens: int) -> None:
        """Open and close the model once: libraries are loaded and files in the page cache from then on."""
        found = self._ask({"tokens": tokens})
        self.runtime, self.compute = found["runtime"], found["compute"]

    def measure(self, prompt_tokens: int, new_tokens: int) -> Round:
        """One round."""
        return Round.model_validate(self._ask({"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _ask(self, request: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it ended with is said below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _error(f"{self.spec}: {answer['error']}", answer["exit_code"])
        return answer

    def _death(self) -> CompressError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return ResourceExhausted(f"{self.spec}: its process was killed, most likely for want of memory; free some")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CompressError(f"{self.spec}: its process ended with {name} while it was measured")


def _error(message: str, code: int) -> CompressError:
    """The error of ours with that exit code."""
    kinds = {kind.exit_code: kind for kind in CompressError.__subclasses__() if "exit_code" in vars(kind)}
    return kinds.get(code, CompressError)(message)


# --- in the process --------------------------------------------------------------------------------------


def serve() -> None:
    """Answer the controller's requests until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the controller, too, which ends this
    spec, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for line in sys.stdin:
        try:
            _answer(answers, _do(spec, threads, json.loads(line)))
        except Exception as error:  # the controller decides what becomes of it
            _answer(answers, {"error": one_line(error), "exit_code": exit_code(error)})


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _do(spec: str, threads: int, request: dict[str, int]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    if "tokens" in request:
        return _prepare(spec, request["tokens"])
    return _measure(spec, request["prompt_tokens"], request["new_tokens"]).model_dump()


def _prepare(spec: str, tokens: int) -> dict[str, Any]:
    from compress.errors import RecipeError
    from compress.interfaces import Streaming
    from compress.measure import open_model

    model = open_model(spec)
    try:
        if not isinstance(model, Streaming):
            raise RecipeError(f"{model.runtime} cannot be timed: its model has no `stream`")
        if tokens > model.context_length:
            raise RecipeError(f"{tokens} tokens exceed its context of {model.context_length}; ask for fewer")
        _warm_up(model, tokens - 1)
        return {"runtime": model.runtime, "compute": model.compute}
    finally:
        model.close()


def _warm_up(model: Any, prefill: int) -> None:
    """Untimed: one pass over a prompt and one token, in a cache of the size that is timed."""
    from compress.bench import random_window

    for _ in model.stream(random_window(prefill + 1, model.vocabulary_size), prefill):
        pass


def _measure(spec: str, prompt_tokens: int, new_tokens: int) -> Round:
    """Open, warm up, time one prompt and its continuation, and close."""
    from compress.bench import random_window
    from compress.measure import open_model

    before = _reset_peak()
    started = time.perf_counter()
    model: LanguageModel = open_model(spec)
    opened = time.perf_counter() - started
    try:
        _warm_up(model, prompt_tokens + new_tokens - 1)
        window = random_window(prompt_tokens + new_tokens, model.vocabulary_size)
        times = [time.perf_counter()]
        for _ in model.stream(window, prompt_tokens):  # type: ignore[attr-defined]
            times.append(time.perf_counter())
        peak = _status("VmHWM") - before
    finally:
        model.close()
    steps = [after - earlier for earlier, after in zip(times[1:], times[2:])]
    load = getattr(model, "load_seconds", opened)
    return Round(load_seconds=load, prefill_seconds=times[1] - times[0], step_seconds=steps, peak_bytes=max(peak, 0))


def _reset_peak() -> int:
    """Give freed memory back and let the kernel count its peak anew; bytes that are resident now."""
    gc.collect()
    return_freed_memory()
    with contextlib.suppress(OSError):  # a kernel without it: earlier rounds opened the same model, their peak will do
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    return _status("VmRSS")


def _status(key: str) -> int:
    """A size that the kernel tells of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
