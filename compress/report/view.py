"""What a report shows of a run: typed stages and checks, for all renderings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.report import figures

Kind = Literal["baseline", "step", "rejected", "release", "holdout", "export"]
SEVERITY = {"FAIL": 0, "INVALID": 1, "INCONCLUSIVE": 2}


@dataclass(frozen=True)
class Sample:
    """An example with the answers of both models; texts may have several lines."""

    id: str
    prompt: str
    reference: str
    model: str
    note: str


@dataclass(frozen=True)
class Check:
    """One gate check; numbers that are absent or not finite are None."""

    metric: str
    unit: str
    source: str
    against: str
    reference: float | None
    value: float | None
    loss: float | None
    lower: float | None
    upper: float | None
    margin: float | None
    confidence: float | None
    examples: float | None
    tokens: float | None
    verdict: str
    definition: str
    reason: str  # why an INVALID check is none, or why somebody must look at this one
    details: Mapping[str, Any]
    aspect: str = "quality"
    samples: tuple[Sample, ...] = ()

    @property
    def measure(self) -> figures.Measure:
        """How this check's loss is shown."""
        return figures.measure(self.metric, self.unit)

    @property
    def exact(self) -> bool:
        """A deterministic quantity: there is no sample and no interval."""
        return self.loss is not None and self.lower == self.upper == self.loss and not self.fixed

    @property
    def fixed(self) -> bool:
        """A loss on a fixed set, read whole: it is known without sampling error."""
        return self.confidence == 1 and self.against in {"baseline", "parent"}

    @property
    def noun(self) -> str:
        """What the examples are."""
        if self.metric in {"long_context", "latency"}:
            return "windows" if self.metric == "long_context" else "rounds"
        return "documents" if self.metric in {"perplexity", "divergence", "bits_per_byte"} else "examples"

    def bounds(self, unit: bool = True) -> str:
        """The confidence bounds, rounded outward."""
        if self.exact:
            return "exact"
        if self.fixed and self.loss is not None:
            return "fixed set"
        if self.lower is None and self.upper is None:
            return figures.NOTHING
        digits = self.measure.digits
        text = f"{digits(self.lower, 'down')} to {digits(self.upper, 'up')}"
        return text + self.measure.suffix if unit else text


@dataclass(frozen=True)
class Stage:
    """A node of the chain: the baseline, an attempt at a step, the final model or an exported artifact."""

    kind: Kind
    label: str  # "3b"
    name: str
    verdict: str = ""
    checks: tuple[Check, ...] = ()
    params: str = ""
    size_bytes: float | None = None
    bits_per_weight: float | None = None
    parameters: float | None = None
    seconds: float | None = None
    peak_rss_bytes: float | None = None
    digest: str = ""
    cached: bool = False
    unchanged: bool = False  # the step left its parent's very tensors
    notes: tuple[str, ...] = ()
    gate_off: tuple[str, ...] = ()
    layer_errors: Mapping[str, float | None] = field(default_factory=dict)
    encodings: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Label and name: "3b quantize.gptq"."""
        return f"{self.label} {self.name}".strip()


@dataclass(frozen=True)
class File:
    """A file of an artifact."""

    name: str
    size_bytes: float | None
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """An exported model: its stage plus what is stored and how it computes."""

    stage: Stage
    path: str
    files: tuple[File, ...]
    runtime: str
    weights_exact: bool | None
    compute: str


@dataclass(frozen=True)
class Reading:
    """A metric of the baseline."""

    metric: str
    source: str
    value: float | None
    interval: str
    examples: float | None
    tokens: float | None


@dataclass(frozen=True)
class Planted:
    """A loss planted to see whether a check finds it."""

    metric: str
    source: str
    measure: figures.Measure
    margin: float | None
    planted: float | None
    measured: float | None
    verdict: str
    reason: str


@dataclass(frozen=True)
class Noise:
    """The loss that identical weights showed in a check."""

    metric: str
    source: str
    measure: figures.Measure
    loss: float | None
    lower: float | None
    upper: float | None
    examples: float | None


@dataclass(frozen=True)
class Report:
    """The whole record."""

    recipe: str
    status: str
    exit_code: str
    error: str
    model: str
    baseline: Stage
    readings: tuple[Reading, ...]
    attempts: tuple[Stage, ...]
    release: Stage | None
    artifacts: tuple[Artifact, ...]
    versions: Mapping[str, str]
    host: Mapping[str, str]
    definitions: Mapping[str, str] = field(default_factory=dict)
    planted: tuple[Planted, ...] = ()
    noise: tuple[Noise, ...] = ()
    holdout: Stage | None = None

    def stages(self) -> Iterator[Stage]:
        """Every node in the order of the chain."""
        yield self.baseline
        yield from self.attempts
        if self.release is not None:
            yield self.release
        if self.holdout is not None:
            yield self.holdout
        yield from (a.stage for a in self.artifacts)

    def metrics(self) -> list[str]:
        """The metrics checked anywhere, in order of appearance, perplexity first."""
        names = list(dict.fromkeys(c.metric for s in self.stages() for c in s.checks))
        return sorted(names, key=lambda name: name != "perplexity")

    def final(self) -> Stage | None:
        """The model after the last accepted step."""
        return next((s for s in reversed(self.attempts) if s.kind == "step"), None)


def worst(checks: tuple[Check, ...] | list[Check], metric: str) -> Check | None:
    """The check of a metric that leaves least of its margin, or is beyond it: what cannot be measured is worst."""
    chosen = [c for c in checks if c.metric == metric]

    def badness(c: Check) -> tuple[int, float]:
        bound = c.upper if c.upper is not None else c.loss
        room = float("-inf") if bound is None or c.margin is None else c.margin - bound
        if c.margin:
            room /= abs(c.margin)
        return (SEVERITY.get(c.verdict, 3), room)

    return min(chosen, key=badness) if chosen else None
