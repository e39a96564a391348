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
