"""A run's folder has one live holder, and a dead one's lock does not stay."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from compress import lock
from compress.errors import Locked

HOLD = """
import sys, time
from pathlib import Path
from compress import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ROOT = Path(__file__).parents[1]


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_live_holder_is_named_until_it_dies(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(Locked, match=rf"in use by process {process.pid};") as caught, lock.hold(tmp_path):
            pass
        assert caught.value.exit_code == 7 and "\n" not in str(caught.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".lock").exists()
        with lock.hold(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_dead_process_that_nobody_reaped_is_dead(tmp_path):
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    with lock.hold(tmp_path):
        held = json.loads((tmp_path / ".lock").read_text())
        assert held["pid"] == os.getpid()
    process.communicate()


@pytest.mark.parametrize(
    "change,lives",
    [
        ({}, True),
        ({"boot": "another"}, False),
        ({"started": 1}, False),
        ({"pid": 2**22 + 1}, False),  # above the kernel's largest id
        ({"host": "elsewhere", "boot": "another"}, True),
    ],
)
def test_who_counts_as_alive(tmp_path, change, lives):
    (tmp_path / ".lock").write_text(json.dumps(asdict(replace(lock.this_process(), **change))))
    if lives:
        with pytest.raises(Locked), lock.hold(tmp_path):
            pass
    else:
        with lock.hold(tmp_path):
            pass


def test_an_empty_lock_is_taken_over_and_a_strangers_is_left(tmp_path):
    (tmp_path / ".lock").write_text("")
    with lock.hold(tmp_path):
        stranger = json.dumps(asdict(replace(lock.this_process(), pid=1)))
        (tmp_path / ".lock").write_text(stranger)
    assert (tmp_path / ".lock").read_text() == stranger


def test_of_many_that_see_a_dead_lock_one_gets_it(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps(asdict(replace(lock.this_process(), started=1))))
    start, done, got, refused = threading.Barrier(16), threading.Barrier(16), [], []

    def contend() -> None:
        start.wait()
        try:
            with lock.hold(tmp_path):
                got.append(1)
                done.wait()
        except Locked:
            refused.append(1)
            done.wait()

    threads = [threading.Thread(target=contend) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 15)
