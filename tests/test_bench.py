"""Artifacts timed in processes of their own, and the page that shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress import bench, run
from compress.bench import METRICS, Benchmark, Estimate, Measured, chart, quality, table
from compress.bench.process import Worker
from compress.bench.quality import Quality
from compress.errors import CompressError, Corrupt, RecipeError, ResourceExhausted
from compress.interfaces import Streaming
from compress.model import Model
from compress.plugin import exporter
from compress.report.markup import VOID
from compress.store import Store
from export._llama_cpp import find
from tests.test_run import INT8, load, place  # noqa: F401 (a fixture)
from tests.tiny_gguf import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gated(place, tmp_path_factory) -> Path:  # noqa: F811
    """A GGUF that a run gated and published."""
    folder = tmp_path_factory.mktemp("gated")
    found, where = run.apply(load(place, f"[{{{INT8}}}]", "[gguf: {}]"), folder / "run", Store(folder / "home"))
    assert found.status == "passed"
    return where / "artifacts" / "gguf"


@pytest.fixture(scope="module")
def ungated(tmp_path_factory) -> Path:
    """An ONNX folder that no gate looked at."""
    folder = tmp_path_factory.mktemp("ungated") / "onnx"
    compress.export(tiny(), "onnx", folder)
    return folder


# --- statistics ------------------------------------------------------------------------------------------


def test_intervals_hold_at_95_percent():
    rng = np.random.default_rng(7)
    covered = [e.lower <= 1.0 <= e.upper for e in (bench.estimate(rng.normal(0, 0.3, 5)) for _ in range(4000))]
    assert 0.94 < np.mean(covered) < 0.96  # the standard error is 0.0034


def test_ratios_are_paired_by_round():
    shared = np.array([0.0, 0.5, -0.4, 0.9, -0.7])  # a machine that is busy now and then
    first, second = shared + 1.0, shared + 1.0 + np.log(2) + np.array([0.01, -0.01, 0.0, 0.01, -0.01])
    alone, ratio = bench.estimate(second), bench.estimate(second - first)
    assert ratio.lower < 2.0 < ratio.upper < 2.05 and alone.upper / alone.lower > 3


# --- the runtimes' streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "gguf", "onnx"])
def test_a_stream_gives_the_logits_of_a_generation(runtime, ungated, tmp_path):
    model = tiny()
    if runtime == "gguf":
        compress.export(model, "gguf", tmp_path / "out")
    opened = (
        model if runtime == "torch" else exporter(runtime)().open(ungated if runtime == "onnx" else tmp_path / "out")
    )
    assert isinstance(opened, Streaming)
    window = model.encode("the model weight scale token group")
    for prefill in (1, 7, len(window) - 1):
        rows = torch.stack([row.clone() for row in opened.stream(window, prefill)])
        expected = opened.decode_logits(window)[prefill - 1 :]
        assert rows.shape == expected.shape == (len(window) - prefill + 1, opened.vocabulary_size)
        tolerance = 0.05 if runtime == "gguf" else 1e-4  # llama.cpp keeps its cache in float16
        assert (rows - expected).abs().max() < tolerance * expected.abs().max()
    opened.close()


# --- measuring -------------------------------------------------------------------------------------------


def test_artifacts_are_measured_in_turns_in_processes_that_end(gated, ungated):
    heard = []
    told = bench.Reporter(progress=lambda label, done: heard.append((label, done)))
    found = bench.bench([str(gated), str(ungated)], prompt_tokens=16, new_tokens=8, rounds=3, threads=1, reporter=told)
    assert not psutil.Process().children(recursive=True)
    assert [label for label, _ in heard] == [f"round {i} of 3" for i in (1, 1, 2, 2, 3, 3)]
    assert [done for _, done in heard] == sorted(done for _, done in heard) and found.threads == 1
    one, two = found.artifacts
    assert one.runtime.startswith("llama.cpp") and two.runtime.startswith("onnxruntime")
    assert one.ratios is None and two.ratios is not None
    for name in METRICS:
        for e in (one.metrics[name], two.metrics[name], two.ratios[name]):
            assert 0 < e.lower <= e.value <= e.upper < float("inf")
        assert two.ratios[name].value == pytest.approx(two.metrics[name].value / one.metrics[name].value, rel=1e-6)
    assert one.metrics["latency_p50_ms"].value <= one.metrics["latency_p95_ms"].value < 1000
    assert one.size_bytes == find(gated).stat().st_size < two.size_bytes
    assert {q.metric for q in one.quality} == {"perplexity", "divergence"} and not two.quality
    text = table.lines(found)
    assert text[-1].endswith("is the ratio to gguf") and sum("tokens/s" in line for line in text) == 4


def test_peak_memory_is_that_of_the_model(tmp_path):
    like = tiny()
    config = like.module.config.to_dict() | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    compress.export(Model(LlamaForCausalLM(LlamaConfig(**config)), like.tokenizer), "gguf", tmp_path / "out")
    size = find(tmp_path / "out").stat().st_size
    worker = Worker(str(tmp_path / "out"), 1)
    worker.prepare(24)
    peaks = [worker.measure(16, 8).peak_bytes for _ in range(2)]
    worker.close()
    assert size > 15e6 and all(0.9 * size < peak < size + 20e6 for peak in peaks), (size, peaks)


def test_the_command_prints_json_and_writes_the_chart(gated, tmp_path):
    words = [sys.executable, "-c", "from compress.cli import main; main()", "bench", str(gated), "--json", "--quiet"]
    words += ["--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "3", "--threads", "1"]
    done = subprocess.run([*words, "--chart", str(tmp_path / "c.html")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["chart"] == str(tmp_path / "c.html") and found["artifacts"][0]["ratios"] is None
    assert found["definitions"].keys() == METRICS.keys() == found["artifacts"][0]["metrics"].keys()
    assert "Quality against speed" in (tmp_path / "c.html").read_text()
    done = subprocess.run([*words[:-1], "9"], capture_output=True, text=True, cwd=ROOT)
    allowed = len(os.sched_getaffinity(0))
    assert done.returncode == 2 and f"threads is 9; this process may use 1 to {allowed}" in done.stderr


def test_what_cannot_be_measured_is_said(gated, tmp_path):
    copy = Path(shutil.copytree(gated, tmp_path / "copy"))
    with pytest.raises(RecipeError, match="1000032 tokens exceed its context of"):
        bench.bench([str(gated)], prompt_tokens=1_000_000, rounds=3)
    with pytest.raises(RecipeError, match="named twice"):
        bench.bench([str(gated), str(gated)])
    with pytest.raises(RecipeError, match="rounds is 2"):
        bench.bench([str(gated)], rounds=2)
    with pytest.raises(RecipeError, match="no such file or folder"):
        bench.bench([str(tmp_path / "absent")])
    raw = bytearray(find(copy).read_bytes())
    raw[-1] ^= 1
    find(copy).write_bytes(raw)
    with pytest.raises(Corrupt, match=find(copy).name):
        bench.bench([str(copy)])
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize(
    "signum,kind,text",
    [(signal.SIGKILL, ResourceExhausted, "want of memory"), (signal.SIGSEGV, CompressError, "SIGSEGV")],
)
def test_a_process_that_dies_is_an_error_of_ours(gated, signum, kind, text):
    worker = Worker(str(gated), 1)
    worker._process.send_signal(signum)
    with pytest.raises(kind, match=text):
        worker.prepare(8)
    worker.close()


# --- the page --------------------------------------------------------------------------------------------


def made_up(name: str, speed: float, size: float, loss: float | None, base: str = "b") -> Measured:
    """An artifact with figures that no machine measured: they test the page."""
    metrics = {key: Estimate(value=speed, lower=0.9 * speed, upper=1.1 * speed) for key in METRICS}
    own = []
    if loss is not None:
        bounds = {"loss": loss, "lower": 0.8 * loss, "upper": 1.2 * loss}
        own = [Quality(metric="divergence", unit="nats per token", source="wiki", base=base, **bounds)]
    return Measured(
        artifact=f"/runs/{name}", name=name, runtime="r", compute="c", size_bytes=int(size), metrics=metrics,
        ratios=None, quality=own,
    )  # fmt: skip


def benchmark(*artifacts: Measured) -> Benchmark:
    host = {"processor": "made up"}
    return Benchmark(
        prompt_tokens=1, new_tokens=2, rounds=3, threads=1, definitions={}, host=host, versions={}, artifacts=artifacts
    )


def test_the_chart_places_points_by_their_figures():
    page = chart.render(benchmark(made_up("a", 50, 2e8, 0.01), made_up("b", 100, 1e8, 0.04)))
    panels = page.split("<figure>")[1:]
    for panel, (across, up) in zip(panels, ((1, 1), (-1, 1)), strict=True):
        points = [tuple(map(float, m)) for m in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', panel)]
        (xa, ya), (xb, yb) = points
        assert (xb - xa) * across > 0 and (ya - yb) * up > 0  # a higher loss is further up: y grows downward
        assert all(58 <= x <= 484 and 14 <= y <= 298.01 for x, y in points)
    assert len(panels) == 2 and page.count('class="name"') == 4


def test_labels_of_neighbours_do_not_overlap():
    page = chart.render(benchmark(*(made_up(f"artifact-{i}", 50 + i / 10, 1e8, 0.02) for i in range(5))))
    for panel in page.split("<figure>")[1:]:
        lines = [float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="\w+" class="name"', panel)]
        assert len(lines) == 5 and min(np.diff(sorted(lines))) >= chart.LINE


def test_only_losses_against_one_model_share_a_chart():
    some = (made_up("a", 50, 2e8, 0.01), made_up("b", 60, 1e8, 0.02), made_up("c", 70, 1e8, 0.03, base="other"))
    page = chart.render(benchmark(*some, made_up("d", 80, 1e8, None)))
    assert page.count("<circle") == 4 and "only in the table: c and d." in page
    assert chart.render(benchmark(made_up("d", 80, 1e8, None))) is None
    assert quality.common([[], []]) is None


class Reader(HTMLParser):
    """Collects elements and addresses, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_escaped():
    page = chart.render(benchmark(made_up("<script>alert(1)</script>", 50, 2e8, 0.01)))
    reader = Reader()
    reader.feed(page)
    assert not reader.open and not reader.addresses and "script" not in reader.seen and {"svg", "table"} <= reader.seen
    assert "default-src 'none'" in page.replace("&#x27;", "'") and "&lt;script&gt;" in page
