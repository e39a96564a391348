"""The sandbox of written programs: what hostile ones try is refused by the kernel, and counted as failed."""

import socket
import subprocess
import sys

import psutil
import pytest

from compress import permission
from compress.errors import RecipeError
from evaluators import _sandbox


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """Permitted, and what was found out about this machine is forgotten afterwards."""
    _sandbox._problem.cache_clear()
    with permission.code_execution():
        yield
    monkeypatch.undo()
    _sandbox._problem.cache_clear()


def run(program, seconds=1, mebibytes=512):
    return _sandbox.run(program, seconds, mebibytes)


def unconfined(program):
    """Whether the same program runs to its end outside of the sandbox, in a bare interpreter."""
    return subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, check=False).returncode == 0


# Each of these does no harm, and ends without an exception exactly if it gets what it wants.
ATTEMPTS = {
    "reads the password file": "open('/etc/passwd').read()",
    "lists the root folder": "import os; os.listdir('/')",
    "reads its parent's environment": "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "reads its own memory map": "open('/proc/self/maps').read()",
    "makes a file": "import os, tempfile; os.remove(tempfile.mkstemp()[1])",
    "makes a file without a name": "import os; os.open('/tmp', os.O_TMPFILE | os.O_WRONLY)",
    "opens the null device for writing": "open('/dev/null', 'w').write('x')",
    "opens a TCP socket": "import socket; socket.socket()",
    "opens a UDP socket": "import socket; socket.socket(type=socket.SOCK_DGRAM)",
    "opens an abstract unix socket": "import socket; socket.socket(socket.AF_UNIX).bind(b'\\0compress-test')",
    "makes a pair of sockets": "import socket; socket.socketpair()",
    "forks": "import os; os.fork() or os._exit(0)",
    "starts a program": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "becomes another program": "import os; os.execv('/bin/true', ['true'])",
    "starts a thread": "import threading; threading.Thread(target=int).start()",
    "signals its parent": "import os; os.kill(os.getppid(), 0)",
    "signals through a descriptor": "import os, fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
    "lifts a limit": "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (r.getrlimit(r.RLIMIT_NOFILE)[1],) * 2)",
    "makes memory that no limit counts": "import os; os.memfd_create('x')",
    "changes its folder": "import os; os.chdir('/tmp')",
    "forks by the bare call": "import ctypes, os; n = ctypes.CDLL(None).syscall(57); n or os._exit(0); assert n > 0",
    "leaves its user": "import ctypes\nassert ctypes.CDLL(None).syscall(272, 0x20000) == 0",
}  # fmt: skip


@pytest.mark.parametrize("what", ATTEMPTS)
def test_what_succeeds_outside_is_refused_inside(what):
    assert unconfined(ATTEMPTS[what]) and run(ATTEMPTS[what]) == "failed"


def test_files_stay_as_they_are(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    before = kept.stat()
    for act in ("open(p, 'w')", "open(p, 'a')", "open(p)", "os.truncate(p, 0)", "os.remove(p)", "os.chmod(p, 0)",
                "os.rename(p, p + 'x')", "os.link(p, p + 'x')", "os.symlink(p, p + 'x')", "os.mkdir(p + 'x')",
                "os.utime(p, (0, 0))", "os.mkfifo(p + 'x')"):  # fmt: skip
        assert run(f"import os\np = {str(kept)!r}\n{act}") == "failed", act
    assert kept.read_text() == "as it was" and list(tmp_path.iterdir()) == [kept]
    assert (kept.stat().st_mode, kept.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_nobody_is_called():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
        assert run(program) == "failed"
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("while True: pass", "out of time"),
        ("import time\ntime.sleep(100)", "out of time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "out of time"),
        ("while True: print('x' * 10**6)", "out of time"),  # its output goes nowhere
        ("import os\nfor d in range(3, 9):\n  try: os.write(d, b'x' * 65536)\n  except OSError: pass", "killed"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "failed"),
        ("x = 'x' * 10**10", "failed"),
        ("def f(): f()\nf()", "failed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("import os\nwhile True: os.fork()", "failed"),
    ],
)  # fmt: skip
def test_bombs_are_contained(program, end):
    assert run(program, mebibytes=128) == end


@pytest.mark.parametrize(
    "program",
    ["import os; os._exit(0)", "raise SystemExit(0)", "exit(0)", "assert False", "1 +", "x = '\0'",
     "raise KeyboardInterrupt",
     "import os\nfor d in range(3, 9):\n  try: os.write(d, b'passed\\n')\n  except OSError: pass\nos._exit(0)"],
)  # fmt: skip
def test_who_leaves_early_or_cannot_be_read_has_not_passed(program):
    assert run(program) == "failed"


def test_a_program_has_the_standard_library_and_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    asked = "bisect collections dataclasses datetime decimal fractions functools heapq itertools json math random re "
    asked += "statistics string typing hashlib copy operator array"
    seed = [sys.executable, "-c", "print(hash('x'))"]
    value = subprocess.run(seed, env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True).stdout
    program = f"""
import os, sys, dataclasses
for name in {asked.split()!r}: __import__(name)
assert "MY_TOKEN" not in os.environ and "secret" not in str(os.environ)
assert hash("x") == {value}
assert input is not None and __name__ == "program" and os.getcwd() == "/"
assert not [p for p in sys.path if "site-packages" in p]
try: input()
except EOFError: pass
else: assert False
@dataclasses.dataclass
class Point: x: int
assert Point(1) == Point(1)
bytearray(100 * 2**20)
"""
    assert run(program) == "passed"
    assert run("bytearray(100 * 2**20)", mebibytes=96) == "failed"


def test_nothing_runs_without_permission():
    with permission.code_execution(False), pytest.raises(RecipeError, match="add --allow-code-execution"):
        run("pass")
    assert run("pass") == "passed"


@pytest.mark.parametrize(
    ("lock", "what"),
    [("    _lock_files()\n", "a folder"), ("    _lock_calls()\n", "a socket"), ("    _try_locks()\n", "SABOTAGE")],
)
def test_a_lock_that_does_not_hold_is_noticed_and_nothing_runs(lock, what, tmp_path, monkeypatch):
    text = _sandbox._CONFINED.read_text()
    assert text.count(lock) == 1
    (tmp_path / "c.py").write_text(
        text.replace(lock, "    raise OSError(1, 'SABOTAGE')\n" if what == "SABOTAGE" else "")
    )
    monkeypatch.setattr(_sandbox, "_CONFINED", tmp_path / "c.py")
    marker = tmp_path / "ran"
    with pytest.raises(RecipeError, match=f"cannot confine them: .*{what}") as error:
        run(f"open({str(marker)!r}, 'w')")
    assert not marker.exists() and "never run unconfined" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(_sandbox._Unlocked, match=what):
        _sandbox._run(f"open({str(marker)!r}, 'w')", 1, 512)
    assert not marker.exists()


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(_sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(RecipeError, match="needs Linux on x86-64, and this is Linux on riscv64"):
        run("pass")


def test_a_program_does_not_outlive_its_parent(tmp_path):
    """PR_SET_PDEATHSIG: killed together with the process that started it, even while it sleeps."""
    code = "from compress import permission\nfrom evaluators import _sandbox\nimport os\n"
    code += "with permission.code_execution():\n    _sandbox.require(); print(os.getpid(), flush=True)\n"
    code += "    _sandbox.run('import time; time.sleep(60)', 30)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        own = int(parent.stdout.readline())
        while not (children := psutil.Process(own).children()):
            assert parent.poll() is None
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
