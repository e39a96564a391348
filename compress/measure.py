"""Measuring without deciding: metrics of one model, and its losses against another, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress import data as data_module
from compress import opening, plugin, scorecard
from compress.decisions import by_cluster
from compress.errors import GateInconclusive, RecipeError
from compress.interfaces import Documents, Evaluator, Example, LanguageModel, Progress, Score
from compress.labels import labels_of
from compress.pairs import mismatch, paired, require
from compress.record import Metric
from compress.scoring import ScoreCache, batches, cached_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Z95 = 1.959964  # two-sided normal quantile
WINDOWS_AT_ONCE = 4  # of 512 tokens: about 400 MB of float32 logits under a vocabulary of 50,000


def open_model(spec: str, dtype: str = "float32") -> LanguageModel:
    """Whatever `spec` names, in the runtime that executes it.

    A folder with an ONNX model opens in onnxruntime, one packed by compressed-tensors in transformers, a .gguf file in
    llama.cpp, all else in torch, see `opening.load`.
    """
    path = Path(spec).expanduser()
    if any((path / name).is_file() for name in opening.GRAPHS):
        return plugin.exporter("onnx")().open(path)
    if _is_packed(path / "config.json"):
        return plugin.exporter("checkpoint")().open(path)
    if path.suffix == ".gguf" or (path.is_dir() and list(path.glob("*.gguf"))):
        return plugin.exporter("gguf")().open(path)
    return opening.load(spec, dtype)


def _is_packed(config: Path) -> bool:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found.get("quantization_config", {}).get("quant_method") in ("compressed-tensors", "gptq")


def documents_of(source: str, length: int, documents: int | None, seed: int = 0) -> Documents:
    """The evaluation documents of a source, as a recipe with this seed would see them."""
    (part,) = data_module.split([data_module.Request("evaluation", source, None, length)], seed)
    pairs = [(d.id, d.text) for d in part.documents[:documents]]
    return Documents(source, pairs, part.digest, length)


def consecutive_windows(source: str, length: int, windows: int) -> Documents:
    """The first `windows` windows of a source's whole text, as one document that `measure` cuts up.

    This is how perplexity on a standard text is usually quoted; neighbouring windows are not independent.
    """
    whole = "".join(d.text for d in data_module.documents(source))
    return Documents(source, [(f"first {windows} windows", whole)], f"windows:{windows}", length)


def score_examples(
    evaluator: Evaluator, model: LanguageModel, data: Documents, windows: int | None
) -> Iterator[list[Example]]:
    """Batches of examples: documents, or single windows where a number of them is given."""
    if windows is None:
        for part in batches(data.documents):
            yield evaluator.examples(replace(data, documents=part), evaluator.encoder(model))
        return
    (whole,) = evaluator.examples(data, evaluator.encoder(model))
    cut = [Example(f"window {i}", f"window {i}", (w,)) for i, w in enumerate(whole.payload[:windows])]
    if len(cut) < windows or len(cut[-1].payload[0]) < data.length:
        raise RecipeError(f"{data.source} fills fewer than {windows} windows of {data.length} tokens")
    for start in range(0, windows, WINDOWS_AT_ONCE):
        yield cut[start : start + WINDOWS_AT_ONCE]


def measure(
    evaluator: Evaluator,
    model: LanguageModel,
    data: Documents,
    *,
    reference: LanguageModel | None = None,
    windows: int | None = None,
    cache: ScoreCache | None = None,
    progress: Progress = lambda label, fraction: None,
) -> Metric:
    """One metric over all documents (or single windows, see `score_examples`), and its loss against a reference.

    Intervals are fixed-sample 95 % intervals over clusters, which for text are documents (linearized ratio):
    for reading, not for deciding. Those of a fixed set have no width.
    Raises GateInconclusive where there is nothing finite to report, RecipeError where both models do not read the same
    tokens.
    """
    scored = _Scored()
    total = windows or len(data.documents)
    for batch in _paired_examples(evaluator, model, data, reference, windows):
        if evaluator.relative or (evaluator.statistic == "census" and reference is not None):
            scored.new += evaluator.score(model, batch, reference)
        else:
            scored.new += cached_scores(evaluator, model, data, batch, cache)
        if reference is not None and not evaluator.relative:
            scored.old += cached_scores(evaluator, reference, data, batch, cache)
        scored.clusters += [example.cluster for example in batch]
        progress(f"{evaluator.name} on {data.source}", min(1.0, len(set(scored.clusters)) / total))
    return _summary(evaluator, data.source, scored)


def _paired_examples(
    evaluator: Evaluator, model: LanguageModel, data: Documents, reference: LanguageModel | None, windows: int | None
) -> Iterator[list[Example]]:
    """Batches of examples, each as the reference's tokenizer sees it too: else unlike things would be compared."""
    ours = score_examples(evaluator, model, data, windows)
    if reference is None:
        yield from ours
        return
    for batch, theirs in zip(ours, score_examples(evaluator, reference, data, windows), strict=True):
        if batch != theirs:
            problem = "the two models read other tokens, so that no loss between them means anything"
            raise RecipeError(f"{evaluator.name} on {data.source}: {problem}; measure each without --against")
        yield batch


@dataclass
class _Scored:
    """Scores of a model and, where there is one to subtract, of its reference, with the clusters of both."""

    new: list[Score] = field(default_factory=list)
    old: list[Score] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)


def _summary(evaluator: Evaluator, source: str, scored: _Scored) -> Metric:
    """The metric over all scores, with its interval, and the loss against the reference's."""
    weights = by_cluster(scored.clusters, np.array([s.weight for s in scored.new]))
    if not len(weights) or not weights.sum():
        raise GateInconclusive(f"{evaluator.name} on {source}: no token was scored; give longer documents")
    totals = by_cluster(scored.clusters, np.array([s.total for s in scored.new]))
    if not (np.isfinite(totals).all() and np.isfinite(weights).all()):
        raise GateInconclusive(f"{evaluator.name} on {source}: the model's scores are not finite")
    exact = evaluator.statistic == "census"  # a fixed set, looked at whole: no sampling error
    mean, half = _ratio(totals, weights, exact)
    against = None
    if scored.old:
        olds = by_cluster(scored.clusters, np.array([s.total for s in scored.old]))
        if not np.isfinite(olds).all():
            raise GateInconclusive(f"{evaluator.name} on {source}: the reference's scores are not finite")
        loss, half_loss = _ratio(totals - olds, weights, exact)
        against = {"loss": loss, "lower": loss - half_loss, "upper": loss + half_loss}

    def value(x: float) -> float:
        return evaluator.value([Score("", x, 1.0)])

    low, high = sorted((value(mean - half), value(mean + half)))  # accuracy falls as wrong answers rise
    return Metric(
        metric=evaluator.name,
        unit=evaluator.unit,
        source=source,
        value=value(mean),
        interval=(low, high),
        examples=len(scored.new),
        tokens=round(float(weights.sum())),
        definition=evaluator.definition,
        aspect=evaluator.aspect,
        against=against,
    )


def _ratio(totals: NDArray[Any], weights: NDArray[Any], exact: bool) -> tuple[float, float]:
    """Σ totals / Σ weights and the half-width of its 95 % interval, infinite for a single example."""
    ratio = float(totals.sum() / weights.sum())
    if exact:
        return ratio, 0.0
    n = len(totals)
    if n < 2:
        return ratio, math.inf
    error = np.std(totals - ratio * weights, ddof=1) / (weights.mean() * math.sqrt(n))
    return ratio, float(_Z95 * error)


def _without_margin(spec: str) -> Evaluator:
    """An evaluator as `name`, as `name:task` where it has tasks, or as `name:SOURCE` where it has data of its own.

    Measuring needs no margin.
    """
    name, _, task = spec.partition(":")
    kind = plugin.evaluator(name)
    required = {field for field, info in kind.model_fields.items() if info.is_required()} - kind.margin_fields
    if required == {"data"}:
        if not task.startswith("file:"):
            raise RecipeError(f"{name} needs data of its own; write {name}:file:PATH")
        return _constructed(kind, data=task)
    if required:
        raise RecipeError(f"{name} needs {', '.join(sorted(required))}: it is for gates of recipes, not for eval")
    if not task:
        return kind.model_construct()
    if "tasks" not in kind.model_fields:
        raise RecipeError(f"{name} has no tasks; write {name} alone")
    return _constructed(kind, tasks=(task,))


def _constructed(kind: type[Evaluator], **fields: Any) -> Evaluator:
    return kind.model_construct(None, **fields)


def _named_by(name: str, check: Callable[[], None]) -> None:
    """Run a check of an evaluator, and let its complaint name it."""
    try:
        check()
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None


def _limited(sources: Sequence[Documents], documents: int | None) -> list[Documents]:
    """At most so many documents of each source, those that an evaluator makes included."""
    return [replace(source, documents=source.documents[:documents]) for source in sources]


def evaluate(
    model: str | LanguageModel,
    names: Sequence[str],
    *,
    against: str | LanguageModel | None = None,
    source: str = "wiki",
    documents: int | None = 200,
    windows: int | None = None,
    length: int = 512,
    dtype: str = "float32",
    efficiency: bool = False,
    progress: Progress = lambda label, fraction: None,
) -> dict[str, Any]:
    """Metrics of a model, or of an exported artifact in its runtime; see `open_model` and `measure`.

    model, against: what `open_model` takes, or a model that is open already (and stays so). Returns {model,
    runtime, compute, against, metrics}; an open model is named by its digest. efficiency: add size and speed.
    Raises RecipeError for unknown evaluators, and for relative ones (divergence) without a reference.
    """
    if dtype not in ("float32", "bfloat16"):
        raise RecipeError(f"dtype {dtype!r}; expected float32 or bfloat16")
    evaluators = [_without_margin(name) for name in names]
    if not evaluators:
        raise RecipeError(f"no evaluator named; {plugin.nearest('', plugin.names('evaluator'))}")
    for e in evaluators:
        _named_by(e.name, e.check)
        if e.statistic == "exact":
            raise RecipeError(f"{e.name} is measured on a run's files, not by eval")
        if e.relative and against is None:
            raise RecipeError(f"{e.name} compares two models; add --against MODEL")
        if windows and e.statistic == "betting":
            raise RecipeError(f"{e.name} asks for answers, not for windows of text; leave --windows out")
        if windows and e.whole:
            raise RecipeError(f"{e.name} weighs whole documents; leave --windows out")
        if windows and e.statistic == "census":
            raise RecipeError(f"{e.name} reads a fixed set of its own; leave --windows out")
    data = consecutive_windows(source, length, windows) if windows else documents_of(source, length, documents)
    opened = open_model(model, dtype) if isinstance(model, str) else model
    for e in evaluators:
        _named_by(e.name, partial(e.check_labels, labels_of(opened)))
        _named_by(e.name, partial(require, e.takes_pairs, paired(opened)))
    if problem := mismatch(paired(opened), (text for _, text in data.documents)):
        raise RecipeError(f"{source}: {problem}")
    reference = open_model(against, dtype) if isinstance(against, str) else against
    metrics = [
        measure(e, opened, part, reference=reference, windows=windows, progress=progress)
        for e in evaluators
        for part in _limited(e.sources([data]), documents)
    ]
    if efficiency:
        metrics += scorecard.efficiency(opened, _path(model), reference, _path(against))
    return {
        "model": _named(model),
        "runtime": opened.runtime,
        "compute": opened.compute,
        "against": None if against is None else _named(against),
        "metrics": [m.model_dump(mode="json") for m in metrics],
    }


def _path(model: str | LanguageModel | None) -> Path | None:
    return Path(model).expanduser() if isinstance(model, str) else None


def _named(model: str | LanguageModel) -> str:
    return model if isinstance(model, str) else f"sha256:{model.digest}"
