"""Training that is killed goes on from its checkpoint and ends with the very same bytes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress import publishing
from compress.interfaces import Context
from compress.plugin import step
from compress.steps.distill._checkpoints import CHECKPOINT, read, write
from compress.store import Store
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
COMMON = {"tokens": 1024, "batch": 2, "selection_tokens": 64, "save_steps": 3, "checks": 5}
CASES = {
    "norms": ("distill.logits", {"learning_rate": 1e-2}),
    "all": ("distill.logits", {"train": "all", "moments": "bfloat16", "learning_rate": 1e-3}),
    "lora": ("distill.logits", {"train": "lora", "lora_rank": 4, "learning_rate": 1e-2, "top_k": 16}),
    "own text": ("distill.on_policy", {"prompt_tokens": 8, "new_tokens": 24, "learning_rate": 1e-2}),
    "scales": ("quantize.scales", {"learning_rate": 1e-2, "patience": None}),
}

# One process pays for the imports and forks another per line; that one kills itself after the given optimizer step.
FORKS = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import peft
from pathlib import Path
from tests.steps.test_distill_resume import train
for line in sys.stdin:
    case, work, last = json.loads(line)
    child = os.fork()
    if child == 0:
        def progress(label, fraction):
            if label.startswith(f"step {last}/"):
                os.kill(os.getpid(), signal.SIGKILL)
        train(case, Path(work), progress)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def windows(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (32,), generator=generator) for _ in range(count)]


def train(case: str, work: Path | None, progress=lambda label, fraction: None):
    """The trained model, and the note on it."""
    name, fields = CASES[case]
    model, teacher = tiny_model(), tiny_model()
    step("prune.magnitude")(sparsity=0.3).apply(model, Context(seed=0))
    if case == "scales":
        step("quantize.rtn")(encoding="int3", group_size=16).apply(model, Context(seed=0))
    data = {"calibration": windows(16, 1), "selection": windows(4, 2), "teacher": lambda: teacher}
    run = Context(seed=0, work=work, progress=progress, **data)
    step(name)(**{**COMMON, **fields}).apply(model, run)
    model.touch()
    return model, run.notes


@pytest.fixture(scope="module")
def killed():
    """Trains until an optimizer step, in a process that is then killed; returns its exit code."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env={**os.environ}
    ) as process:

        def until(case: str, work: Path, last: int) -> int:
            print(json.dumps([case, str(work), last]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield until
        process.stdin.close()


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_with_the_bytes_of_an_undisturbed_one(case, killed, tmp_path):
    work, other = tmp_path / "killed", tmp_path / "plain"
    work.mkdir(), other.mkdir()
    assert killed(case, work, 5) == -9  # before the second checkpoint
    assert read(work / CHECKPOINT)[1]["course"]["taken"] == 3
    assert killed(case, work, 13) == -9
    assert read(work / CHECKPOINT)[1]["course"]["taken"] == 12
    heard: list[str] = []
    model, notes = train(case, work, lambda label, _: heard.append(label))
    plain, said = train(case, other)
    assert [label for label in heard if label.startswith("step")][0].startswith("step 13/16")
    assert model.digest == plain.digest and notes == said
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (work, other)]
    assert files[0] == files[1] and files[0].keys() >= {CHECKPOINT, "state-0.safetensors"}


def trained(work: Path, **fields) -> tuple[str, list[str]]:
    CASES["other"] = ("distill.logits", {"learning_rate": 1e-2, **fields})
    heard: list[str] = []
    model, _ = train("other", work, lambda label, _: heard.append(label))
    return model.digest, [label for label in heard if label.startswith("step")]


@pytest.mark.parametrize("damage", ["checkpoint", "state", "missing state", "settings", "not safetensors"])
def test_what_does_not_fit_is_not_used(damage, tmp_path, caplog):
    digest, steps = trained(tmp_path, save_steps=5)
    states = sorted(tmp_path.glob("state-*.safetensors"))
    if damage == "missing state":
        states[0].unlink()
    elif damage == "not safetensors":
        (tmp_path / CHECKPOINT).write_bytes(b"\x80\x04pickle")
    elif damage != "settings":
        path = tmp_path / CHECKPOINT if damage == "checkpoint" else states[0]
        changed = bytearray(path.read_bytes())
        changed[-3] ^= 1
        path.write_bytes(changed)
    caplog.clear()
    again, repeated = trained(tmp_path, save_steps=5, clip=2.0 if damage == "settings" else 1.0)
    assert len(repeated) == len(steps) == 16  # from the start
    assert (again == digest) or damage == "settings"
    if damage != "missing state":
        assert "training starts anew" in caplog.text


def test_files_are_tensors_and_json_alone(tmp_path):
    trained(tmp_path, train="all", save_steps=4)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        facts = json.loads(file.metadata()["compress"])["facts"]
        names = list(file.keys())
    assert facts["course"]["taken"] == 16 and len(names) == 4 * 21  # of each parameter also two moments and a count
    assert not list(tmp_path.glob(".*"))


def test_what_is_written_comes_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.0), "c": torch.ones(5, dtype=torch.bfloat16)}
    write(tmp_path / "x.safetensors", tensors, {"n": [1, None]})
    found, facts = read(tmp_path / "x.safetensors")
    assert facts == {"n": [1, None]} and found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_the_store_keeps_unfinished_work_and_drops_what_is_finished_or_forgotten(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.work("key") as folder:
        (folder / "file").touch()
        with store.work("key") as other:
            assert other is None  # another process, or as here another descriptor, holds it
        raise KeyboardInterrupt
    with store.work("key") as again:
        assert again == folder and (again / "file").exists()
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), store.work("key"):
        raise KeyboardInterrupt
    store.sweep()
    assert folder.exists()
    long_ago = time.time() - 30 * 86400
    os.utime(folder, (long_ago, long_ago))
    with publishing.held(folder):
        store.sweep()
    assert folder.exists()
    store.sweep()
    assert not folder.exists()
