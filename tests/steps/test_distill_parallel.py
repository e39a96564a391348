"""Two processes under torchrun take the very steps of one that reads both their windows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.interfaces import Context
from compress.plugin import step
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
# 20 windows in steps of 4; the second step of 3 windows leaves one to the second process, the last of 1 leaves none.
CASES = {
    "all": ("distill.logits", {"train": "all", "learning_rate": 1e-3, "tokens": 13 * 32, "batch": 4}),
    "qat": ("distill.qat", {"tokens": 7 * 32, "batch": 3}),
}
WORKER = """
import sys
import torch
from torch import distributed
torch.set_num_threads(1)
distributed.init_process_group("gloo")
from compress.errors import RecipeError
from compress.plugin import step
from tests.steps.test_distill_parallel import CASES, context, train
for case in CASES:
    lines, digest = train(case)
    sys.stdout.write(f"{case} rank {distributed.get_rank()}: {' '.join(lines)}; {digest}\\n")
    sys.stdout.flush()
try:
    step("distill.on_policy")().apply(train.student(), context([]))
except RecipeError as error:
    sys.stdout.write(f"refused rank {distributed.get_rank()}: {error}\\n")
    sys.stdout.flush()
distributed.destroy_process_group()
"""


def windows(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (32,), generator=generator) for _ in range(count)]


def context(heard: list[str]) -> Context:
    return Context(0, windows(20, 1), windows(3, 2), tiny_model, progress=lambda label, _: heard.append(label))


def student():
    model = tiny_model()
    step("quantize.rtn")(encoding="int3", group_size=16, embeddings=None).apply(model, Context(seed=0))
    return model


def train(case: str) -> tuple[list[str], str]:
    """Losses of the optimizer steps, the note's figures, and the digest of the model."""
    name, fields = CASES[case]
    model, heard = student(), []
    if case != "qat":
        model.encoded.clear()  # rounded floats, which may learn
    run = context(heard)
    step(name)(selection_tokens=96, checks=1, **fields).apply(model, run)
    model.touch()
    losses = [label.split("loss ")[1] for label in heard if label.startswith("step")]
    return losses + re.findall(r"\d+\.\d{4}", run.notes[-1]), model.digest


train.student = student


def test_two_processes_equal_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", WORKER],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        said = re.findall(rf"^{case} rank \d: (.*); (\w+)$", done.stdout, re.MULTILINE)
        assert len(said) == 2 and said[0] == said[1], done.stdout  # both end with the same weights
        losses, _ = train(case)
        found = [float(x) for x in said[0][0].split()]
        assert len(found) == len(losses) == 4 + 2 - (case == "qat")
        assert found == pytest.approx([float(x) for x in losses], abs=1e-4), case
    assert done.stdout.count("the model writes in one process, found 2") == 2
