"""What a user sees while waiting: a live bar with time left on a terminal, rare plain lines elsewhere, or nothing."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from compress.console import Pace, _plain_progress, errors
from compress.errors import Interrupted

ROOT = Path(__file__).parents[1]
WORK = """
import sys, time
from compress.console import reporter
with reporter(quiet={quiet}) as told:
    told.say("step [one] of 2")
    for i in range(1, 8):
        time.sleep(0.15)
        told.progress(f"gate x: block {{i}}/8", i / 8)
    told.say("done")
"""


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def on_terminal(quiet: bool = False, **variables: str) -> str:
    """What the work above writes to a terminal."""
    control, terminal = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "100", **variables}
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    words = [sys.executable, "-c", WORK.format(quiet=quiet)]
    process = subprocess.Popen(words, stdout=terminal, stderr=terminal, cwd=ROOT, env={**kept, **environment})
    os.close(terminal)
    found = b""
    try:
        while chunk := os.read(control, 65536):
            found += chunk
    except OSError:  # Linux ends a terminal that nobody holds with EIO
        pass
    os.close(control)
    assert process.wait() == 0, found
    return found.decode()


def test_time_left_follows_the_pace_of_the_part():
    clock = Clock()
    pace = Pace(clock)
    assert pace.heard("gate a: perplexity", 0.2) and pace.left() == ""  # when the part began is not known
    clock.now += 30
    assert not pace.heard("gate a: divergence", 0.5) and pace.left() == "50 s left"  # 0.3 in 30 s
    clock.now += 30
    assert not pace.heard("gate a: perplexity", 0.5) and pace.left() == "1 min 40 s left"
    assert not pace.heard("gate a: perplexity", 1.0) and pace.left() == ""
    assert pace.heard("gate a: decode", 0.1) and pace.left() == ""  # fell back: something else began
    clock.now += 36
    assert not pace.heard("gate a: decode", 0.101) and pace.left() == "8 h 59 min left"
    assert pace.heard("gate b: perplexity", 0.9)


def test_plain_lines_are_rare_and_say_how_long():
    clock, lines = Clock(), []
    progress = _plain_progress(clock=clock, write=lines.append)
    for second in range(1, 101):
        clock.now += 1
        progress("wanda: block", second / 100)
    assert len(lines) == 10 and lines[0] == "    wanda: block  10%, 1 min 30 s left"
    assert lines[-2] == "    wanda: block  90%, 10 s left" and lines[-1] == "    wanda: block  100%"


def test_a_terminal_shows_a_bar_with_time_left():
    shown = on_terminal()
    assert "step [one] of 2" in shown and "done" in shown  # brackets are no markup
    assert "\x1b[38;" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"gate x: block 2/8 ━+╺?━+ 0:00:0\d 1 s left", plain), plain
    assert re.search(r"gate x: block 7/8 ━+╺?━+ 0:00:0\d 0 s left", plain), plain


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(variables):
    shown = on_terminal(**variables)
    assert "step [one] of 2" in shown and "done" in shown
    assert not re.search(r"\x1b\[(3[0-7]|9[0-7]|38;|48;)", shown), shown
    if "TERM" in variables:
        assert "\x1b" not in shown


def test_quiet_is_silent_and_a_pipe_gets_plain_lines():
    assert on_terminal(quiet=True) == ""
    words = [sys.executable, "-c", WORK.format(quiet=False)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "" and done.stderr == "step [one] of 2\ndone\n"  # a second's work needs no progress


def masked(cause: BaseException, explicit: bool) -> SystemError:
    """What C code makes of an exception that it did not expect."""
    try:
        try:
            raise cause
        except BaseException as error:
            if explicit:
                raise SystemError("initialization raised an unreported exception") from error
            raise SystemError("initialization raised an unreported exception")  # noqa: B904
    except SystemError as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
def test_an_error_that_a_signal_caused_ends_as_that_signal(explicit, capsys):
    with pytest.raises(typer.Exit) as ended, errors(debug=False):
        raise masked(Interrupted(signal.SIGINT), explicit)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "compress: interrupted by SIGINT; run the same command again to resume\n"
    with pytest.raises(typer.Exit) as ended, errors(debug=False):
        raise masked(ValueError("no signal"), explicit)
    assert ended.value.exit_code == 1 and "internal error, SystemError" in capsys.readouterr().err
