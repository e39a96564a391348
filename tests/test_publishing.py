"""Folders appear whole, are kept or replaced, and leftovers of the dead go while those of the living stay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.publishing import publish, staging, sweep

ROOT = Path(__file__).parents[1]
FILL = """
import sys, time
from pathlib import Path
from compress.publishing import staging
with staging(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("x")
    print(temporary, flush=True)
    time.sleep(60)
"""


def fill(folder: Path, text: str, keep: bool = False) -> None:
    with staging(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text)
        assert not folder.exists() or (folder / "inner" / "file").read_text() != text
        publish(temporary, folder, keep)


def test_a_folder_is_published_replaced_or_kept(tmp_path):
    target = tmp_path / "deep" / "entry"
    for text, keep, expected in (("one", False, "one"), ("two", True, "one"), ("three", False, "three")):
        fill(target, text, keep)
        assert (target / "inner" / "file").read_text() == expected
        assert list(target.parent.iterdir()) == [target]


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "entry") as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_sweep_removes_the_folders_of_the_dead_only(tmp_path):
    command = [sys.executable, "-c", FILL, str(tmp_path / "entry")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        temporary = Path(process.stdout.readline().strip())
        sweep(tmp_path)
        assert (temporary / "half").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (temporary / "half").exists()
        sweep(tmp_path)
    assert not list(tmp_path.iterdir())


# Imports cost seconds: one process pays for them, and forks one per case that may write files of so many bytes.
LIMITED = """
import os, resource, sys
from pathlib import Path
import compress
from compress import artifact, console, ungated
from compress.store import Store
from tests.test_provenance import rounded
from tests.tiny_classifier import tiny_classifier
from tests.tiny_gguf import tiny
from tests.tiny_seq2seq import tiny_seq2seq
model = rounded()
list(model.logits([[1, 2]]))
portable = {"flavour": "portable"}
kinds = {
    "gguf": (model, "gguf", {}),
    "onnx": (model, "onnx", {}),
    "portable": (model, "onnx", portable),
    "classifier": (tiny_classifier(), "onnx", portable),
    "seq2seq": (tiny_seq2seq(), "onnx", portable),
    "checkpoint": (tiny(), "checkpoint", {}),
}
with console.errors(False):
    ungated.write(model, ungated.configured("gguf"), Path(sys.argv[1]) / "warm")
for i, word in enumerate(sys.argv[2:]):
    kind, limit = word.split(":")
    place = Path(sys.argv[1]) / str(i)
    place.mkdir()
    if os.fork():
        code = os.waitstatus_to_exitcode(os.wait()[1])
        print(word, code, sorted(p.name for p in place.rglob("*")), flush=True)
        continue
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        with console.errors(False):
            if kind == "artifact":
                artifact.save(model, place / "out")
            else:
                held, format, fields = kinds[kind]
                ungated.write(held, ungated.configured(format, fields), place / "out")
    except BaseException as error:
        os._exit(error.exit_code)
    os._exit(0)
"""


def test_a_full_disk_leaves_no_half_written_artifact(tmp_path):
    cases = [f"{kind}:{limit}" for kind in ("gguf", "artifact") for limit in (0, 1000, 20_000, 150_000)] + ["onnx:1000"]
    for kind in ("portable", "classifier", "seq2seq", "checkpoint"):
        cases += [f"{kind}:{limit}" for limit in (0, 1000, 20_000)]
    words = [sys.executable, "-c", LIMITED, str(tmp_path), *cases, "gguf:9000000"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has none of its parent's threads, and would wait for them
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=alone, timeout=300)
    *full, last = done.stdout.splitlines()
    assert full == [f"{case} 6 []" for case in cases], done.stderr
    assert last.startswith("gguf:9000000 0 ['README.md', ")
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases) and all("the disk is full, or a limit" in line for line in lines), done.stderr
