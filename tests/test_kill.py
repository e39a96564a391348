"""Runs that are killed, and runs that are asked to end: nothing is lost, and nothing differs in the end."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import report
from tests.test_run import INT4, INT8, RECIPE, place  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from compress.cli import main; main()"]
STEPS = f"[{{prune.magnitude: {{sparsity: 0.05}}, gate: off}}, {{{INT4}, otherwise: [{{{INT8}}}]}}]"

# Imports cost seconds: one process pays for them, and forks one that runs the recipe per line of its input. The
# child counts its changes to the file system and kills itself just before the one whose number it was given:
# a moment between two changes is no other than the one before the second.
FORKS = """
import os, signal, sys
from pathlib import Path
import accelerate, gguf, llama_cpp, scipy.special, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
import compress.report, export.gguf
from compress import recipe, run
from compress.store import Store

def kill_before(number):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            if not (writes and str(arguments[0]).startswith("/dev")):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return lambda: count

for line in sys.stdin:
    text, folder, home, number = line.split()
    child = os.fork()
    if child == 0:
        count = kill_before(int(number))
        record, _ = run.apply(recipe.load(Path(text)), Path(folder), Store(Path(home)))
        print(count(), flush=True)
        os._exit(record.exit_code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def digests(*folders: Path) -> dict[str, str]:
    """sha256 of every file, by its path within its folder."""
    files = [(p.relative_to(f), p) for f in folders for p in sorted(f.rglob("*")) if p.is_file()]
    return {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files}


def published(where: Path) -> dict[str, str]:
    return digests(where / "run" / "artifacts", where / "home" / "store" / "artifacts")


@pytest.fixture(scope="module")
def text(place, tmp_path_factory) -> Path:  # noqa: F811
    """A recipe of two steps, a rejected attempt and an export, as a file."""
    path = tmp_path_factory.mktemp("recipe") / "chain.yaml"
    written = RECIPE.format(model=place / "model", text=place / "text.jsonl", steps=STEPS, export="[gguf: {}]")
    path.write_text(written.replace("max_mean: 0.02", "max_mean: 0.2").replace("5%", "50%"))
    return path


class Forks:
    """The process that forks a run per call."""

    def __init__(self, recipe: Path):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self.recipe = recipe

    def apply(self, run: Path, home: Path, kill_before: int = 0) -> tuple[int, int]:
        """Exit code, negative for a signal, and the number of changes if it got to the end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(self.recipe, run, home, kill_before, file=self.process.stdin, flush=True)
        first = int(self.process.stdout.readline())
        return (first, 0) if first < 0 else (int(self.process.stdout.readline()), first)


@pytest.fixture(scope="module")
def forks(text):
    found = Forks(text)
    yield found
    found.process.communicate()


def is_sound(run: Path) -> bool:
    """Whether the record is finished, the pages show it, and nothing temporary is left."""
    record = json.loads((run / "run.json").read_text())
    shown = (run / "report.html").read_text() == report.render_html(record)
    return shown and record["status"] == "passed" and record["error"] is None and not list(run.glob(".*.tmp"))


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(forks, tmp_path):
    plain = tmp_path / "plain"
    code, changes = forks.apply(plain / "run", plain / "home")
    expected = published(plain)
    assert code == 0 and changes > 50 and any(name.endswith(".gguf") for name in expected)
    rng = random.Random(5)
    kills = leftovers = ends = 0
    code, where = 0, plain
    while kills < 10 or code < 0:  # one that gets to its end is compared, and another started
        if code == 0:
            where = tmp_path / f"disturbed-{ends}"
        code, _ = forks.apply(where / "run", where / "home", rng.randint(1, changes // 2) if kills < 10 else 0)
        if code == -signal.SIGKILL:
            kills += 1
            leftovers += len(list(where.rglob(".*.tmp")))
        else:
            assert code == 0 and published(where) == expected and is_sound(where / "run")
            assert not list((where / "home" / "store" / "artifacts").glob(".*"))
            ends += 1
    assert leftovers and ends


def test_a_run_killed_in_its_last_moments_is_finished_by_the_next(forks, tmp_path):
    home = tmp_path / "home"
    code, _ = forks.apply(tmp_path / "first", home)
    code, changes = forks.apply(tmp_path / "cached", home)
    expected = digests(tmp_path / "cached" / "artifacts")
    for number in range(changes - 5, changes + 1):
        run = tmp_path / f"killed-{number}"
        assert forks.apply(run, home, number)[0] == -signal.SIGKILL
        code, _ = forks.apply(run, home)
        assert code == 0 and digests(run / "artifacts") == expected and is_sound(run), number


@pytest.mark.parametrize("signum,name", [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_a_run_soon_and_it_resumes(text, tmp_path, signum, name):
    environment = {**os.environ, "COMPRESS_HOME": str(tmp_path / "home")}
    command = [*COMMAND, "apply", str(text), "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stderr is not None
        while "int8" not in (line := process.stderr.readline()):  # the alternative begins
            assert line, "it ended before that"
        process.send_signal(signum)
        started = time.monotonic()
        rest = process.stderr.read().strip().splitlines()
        assert process.wait() == 128 + signum and time.monotonic() - started < 5
    assert rest[-1] == f"compress: interrupted by {name}; run the same command again to resume"
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (found["status"], found["exit_code"]) == ("error", 128 + signum) and name in found["error"]
    assert len(found["steps"]) == 1 and name in (tmp_path / "run" / "report.md").read_text()
    assert not (tmp_path / "run" / ".lock").exists() and not list(tmp_path.rglob(".*.tmp"))
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["steps"][0]["cached"], done.stderr


STUCK = """
import signal, sys, threading, time
from compress import console
console.PATIENCE = 0.3
console.end_on_signals()
word = "ready"
while True:
    try:
        print(word, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        word = "lost"  # as it is in a callback from C
"""


@pytest.mark.parametrize("twice", [False, True])
def test_a_lost_interruption_and_a_second_one_end_the_process(twice):
    code = STUCK.replace("0.3", "60") if twice else STUCK
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "lost\n"
        if twice:
            process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait() == (130 if twice else 143) and time.monotonic() - started < 5
