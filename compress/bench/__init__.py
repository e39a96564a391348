"""Speed and memory of artifacts, each in its own runtime and process, taken in turns, with intervals."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress import environment, sealing, source, verify
from compress.bench import quality
from compress.bench.process import Round, Worker
from compress.bench.quality import Quality
from compress.errors import CompressError, RecipeError
from compress.workbench import Reporter

MINIMUM_ROUNDS = 3  # below, a t interval has one degree of freedom and says nothing
CONFIDENCE = 0.95


class Metric(BaseModel):
    """How a figure is shown."""

    model_config = ConfigDict(frozen=True)

    title: str
    unit: str
    definition: str


METRICS: Mapping[str, Metric] = {
    "load_ms": Metric(
        title="load",
        unit="ms",
        definition="time the runtime takes to load the weights from files that are in the page cache",
    ),
    "prefill_tokens_per_second": Metric(
        title="prefill",
        unit="tokens/s",
        definition="prompt tokens read in one pass, per second, up to the logits after the last one",
    ),
    "decode_tokens_per_second": Metric(
        title="decode",
        unit="tokens/s",
        definition="tokens fed one by one through the key-value cache after the prompt, per second",
    ),
    "latency_p50_ms": Metric(title="p50", unit="ms", definition="median time of one decoded token within a round"),
    "latency_p95_ms": Metric(title="p95", unit="ms", definition="95th percentile of the time of one decoded token"),
    "peak_memory_mb": Metric(
        title="memory",
        unit="MB",
        definition="highest resident memory while the model is open, less what its process (Python and libraries) "
        "held before; mapped weights count once they are read",
    ),
}


class Estimate(BaseModel):
    """A geometric mean over rounds with its 95 % interval (Student's t on logarithms)."""

    model_config = ConfigDict(frozen=True)

    value: float
    lower: float
    upper: float


class Measured(BaseModel):
    """One artifact. ratios: to the first artifact, paired by round; None for the first itself."""

    model_config = ConfigDict(frozen=True)

    artifact: str
    name: str
    runtime: str
    compute: str
    size_bytes: int
    metrics: dict[str, Estimate]
    ratios: dict[str, Estimate] | None
    quality: list[Quality]


class Benchmark(BaseModel):
    """What was measured, and how."""

    model_config = ConfigDict(frozen=True)

    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    confidence: float = CONFIDENCE
    definitions: dict[str, str]
    host: dict[str, str | int]
    versions: dict[str, str]
    artifacts: list[Measured]


def bench(
    artifacts: Sequence[str],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Benchmark:
    """Measure artifacts in turns; what `measure.open_model` takes is an artifact here.

    Each has a process of its own, opens the model anew in every round and closes it at its end, so that only one model
    is open at any time; every other round goes through them backwards. threads: at most those that this process may
    use, by default all. Raises RecipeError for what cannot be measured, Corrupt for an artifact that is not what its
    manifest says, ResourceExhausted where a process is killed for want of memory.
    """
    told = reporter or Reporter()
    allowed = len(os.sched_getaffinity(0))
    used = threads or allowed
    _require(artifacts, rounds, used, allowed)
    sizes = {spec: _size(spec) for spec in artifacts}
    workers: list[Worker] = []
    try:
        for spec in artifacts:
            told.say(f"opening {spec}")
            workers.append(Worker(spec, used))
            workers[-1].prepare(prompt_tokens + new_tokens)
        taken: list[list[Round]] = [[] for _ in workers]
        for i in range(rounds):
            for k in range(len(workers)) if i % 2 == 0 else reversed(range(len(workers))):
                done = i * len(workers) + sum(len(r) > i for r in taken)
                told.progress(f"round {i + 1} of {rounds}", done / (rounds * len(workers)))
                taken[k].append(workers[k].measure(prompt_tokens, new_tokens))
    finally:
        for worker in workers:
            worker.close()
    return Benchmark(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=used,
        definitions={name: metric.definition for name, metric in METRICS.items()},
        host=environment.host(),
        versions=environment.versions(),
        artifacts=_measured(artifacts, sizes, workers, [_logarithms(own, prompt_tokens) for own in taken]),
    )


def _require(artifacts: Sequence[str], rounds: int, threads: int, allowed: int) -> None:
    if repeated := [spec for spec in artifacts if artifacts.count(spec) > 1]:
        raise RecipeError(f"{repeated[0]} is named twice; an artifact is measured against others")
    if rounds < MINIMUM_ROUNDS:
        raise RecipeError(f"rounds is {rounds}; an interval needs at least {MINIMUM_ROUNDS}")
    if not 1 <= threads <= allowed:
        raise RecipeError(f"threads is {threads}; this process may use 1 to {allowed}")
    for folder in map(quality.folder_of, artifacts):
        if folder is not None and (folder / sealing.FILE).is_file():
            verify.verify(folder)  # before its figures are shown beside anything


def _size(spec: str) -> int:
    """Bytes of the files that a runtime reads: the manifest's figure, or the sum of what is there."""
    facts = quality.manifest(spec)
    if facts is not None:
        return int(facts["size_bytes"])
    path = Path(spec).expanduser()
    if not path.exists():
        found = source.resolve(spec).path
        if found is None:
            raise RecipeError(f"{spec} is not on this machine; download it first, e.g. with `compress eval`")
        path = found
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _logarithms(rounds: Sequence[Round], prompt_tokens: int) -> dict[str, Any]:
    """Logarithm of each metric in each round, (rounds,)."""
    found = [
        {
            "load_ms": 1e3 * r.load_seconds,
            "prefill_tokens_per_second": prompt_tokens / r.prefill_seconds,
            "decode_tokens_per_second": len(r.step_seconds) / sum(r.step_seconds),
            "latency_p50_ms": 1e3 * float(np.percentile(r.step_seconds, 50)),
            "latency_p95_ms": 1e3 * float(np.percentile(r.step_seconds, 95)),
            "peak_memory_mb": max(r.peak_bytes, 1) / 1e6,
        }
        for r in rounds
    ]
    return {name: np.log([row[name] for row in found]) for name in METRICS}


def _measured(
    artifacts: Sequence[str], sizes: Mapping[str, int], workers: Sequence[Worker], logs: Sequence[dict[str, Any]]
) -> list[Measured]:
    names = short_names(artifacts)
    return [
        Measured(
            artifact=spec,
            name=names[spec],
            runtime=worker.runtime,
            compute=worker.compute,
            size_bytes=sizes[spec],
            metrics={name: estimate(own[name]) for name in METRICS},
            ratios=None if i == 0 else {name: estimate(own[name] - logs[0][name]) for name in METRICS},
            quality=quality.of(spec),
        )
        for i, (spec, worker, own) in enumerate(zip(artifacts, workers, logs, strict=True))
    ]


def estimate(logs: Any) -> Estimate:
    """Geometric mean, from logarithms, (n,), with its two-sided t interval.

    >>> found = estimate(np.log([9.0, 10.0, 11.0]))
    >>> round(found.lower, 2), round(found.value, 2), round(found.upper, 2)
    (7.77, 9.97, 12.79)
    """
    from scipy.special import stdtrit

    n = len(logs)
    mean = float(np.mean(logs))
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.std(logs, ddof=1) / math.sqrt(n))
    found = Estimate(value=math.exp(mean), lower=math.exp(mean - half), upper=math.exp(mean + half))
    if not all(map(math.isfinite, (found.value, found.lower, found.upper))):
        raise CompressError("a measured time is not finite; measure again")
    return found


def short_names(specs: Sequence[str]) -> dict[str, str]:
    """The shortest ends of paths that tell them apart, without the folder that every run has.

    >>> list(short_names(["runs/a/artifacts/gguf", "runs/b/artifacts/gguf", "pkg:llm"]).values())
    ['a/gguf', 'b/gguf', 'pkg:llm']
    """
    parts = {spec: [p for p in spec.rstrip("/").split("/") if p != "artifacts"] or [spec] for spec in specs}
    found = {}
    for spec, own in parts.items():
        others = [p for other, p in parts.items() if other != spec]
        length = next((n for n in range(1, len(own)) if all(p[-n:] != own[-n:] for p in others)), len(own))
        found[spec] = "/".join(own[-length:])
    return found


def random_window(length: int, vocabulary: int) -> list[int]:
    """Token ids that are the same for every artifact: what they say does not matter to speed."""
    rng = random.Random(0)
    return [rng.randrange(vocabulary) for _ in range(length)]
