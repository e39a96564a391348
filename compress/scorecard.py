"""The scorecard of a model: quality, safety, robustness and efficiency side by side, and never one number.

A weighted sum would say how much accuracy a bias is worth; nobody can.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.interfaces import LanguageModel, Streaming
from compress.pairs import paired
from compress.record import Metric

DEFAULT = ("perplexity", "accuracy:minimal_pairs", "stereotypes", "pronouns", "robustness:minimal_pairs")
ASPECTS = ("quality", "safety", "robustness", "efficiency")
PROMPT, WRITTEN, ROUNDS = 16, 16, 6  # tokens read, tokens decoded, and how often
_T95 = 2.570582  # two-sided Student quantile of ROUNDS − 1 degrees of freedom
_TEXT = "A scale says how much a thing weighs; a second one says whether the first can be trusted. " * 4
_WEIGHTS = {".onnx", ".data", ".gguf", ".safetensors"}
_BAR = 24  # characters


def efficiency(
    model: LanguageModel, path: Path | None, reference: LanguageModel | None = None, other: Path | None = None
) -> list[Metric]:
    """Size and time per decoded token, as far as each can be known; path: where the model was opened."""
    found = []
    if (size := _size(model, path)) is not None:
        base = _size(reference, other) if reference is not None else None
        found.append(_size_metric(size, base))
    if isinstance(model, Streaming) and not paired(model):  # its `stream` would refuse
        found.append(_speed_metric(model))
    return found


def _size(model: LanguageModel, path: Path | None) -> int | None:
    """Bytes of the weights: as stored by us, or of the files of an export."""
    from compress.encodings import EncodedTensor
    from compress.model import Model

    if isinstance(model, Model):
        tensors = [tensor for _, tensor in model.tensors()]
        return round(sum(t.nominal_bytes if isinstance(t, EncodedTensor) else 4 * t.numel() for t in tensors))
    if path is None or not path.exists():
        return None
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in _WEIGHTS]
    return sum(p.stat().st_size for p in files)


def _size_metric(size: int, base: int | None) -> Metric:
    change = None if base is None else float(size - base)
    return Metric(
        metric="size",
        unit="bytes",
        source="files",
        value=size,
        interval=(size, size),
        examples=1,
        tokens=0,
        definition="bytes of the stored weights: codes, scales, zero points and floats.",
        aspect="efficiency",
        against=None if change is None else {"loss": change, "lower": change, "upper": change},
    )


def _speed_metric(model: LanguageModel) -> Metric:
    assert isinstance(model, Streaming)
    window = (model.encode(_TEXT) * (PROMPT + WRITTEN))[: PROMPT + WRITTEN]
    times = []
    for _ in range(ROUNDS + 1):
        stream = model.stream(window, PROMPT)
        next(stream)  # the prompt is not timed
        started = time.perf_counter()
        decoded = sum(1 for _ in stream)
        times.append(1000 * (time.perf_counter() - started) / decoded)
    kept = times[1:]  # the first round warms up
    mean = sum(kept) / len(kept)
    half = _T95 * math.sqrt(sum((t - mean) ** 2 for t in kept) / (len(kept) - 1) / len(kept))
    return Metric(
        metric="time",
        unit="ms per token",
        source="this machine",
        value=mean,
        interval=(max(0.0, mean - half), mean + half),
        examples=ROUNDS,
        tokens=ROUNDS * WRITTEN,
        definition="time per token decoded one by one, in this runtime on this machine; see `compress bench`.",
        aspect="efficiency",
    )


def lines(found: dict[str, Any]) -> list[str]:
    """Metrics for a reader, under a heading for each aspect where there are several."""
    metrics: Sequence[dict[str, Any]] = found["metrics"]
    present = {m["aspect"] for m in metrics}
    text = [f"{found['model']}  ({found['runtime']}; {found['compute']})"]
    for aspect in (a for a in ASPECTS if a in present):
        text += [aspect] if len(present) > 1 else []
        for metric in (m for m in metrics if m["aspect"] == aspect):
            text += _lines_of(metric, found["against"])
    return text


def _lines_of(metric: dict[str, Any], against: str | None) -> list[str]:
    low, high = metric["interval"]
    value = f"{metric['value'] / 1e6:.1f} MB" if metric["unit"] == "bytes" else f"{metric['value']:.4f}"
    line = f"{metric['metric']}  {value}"
    known = low is not None and high is not None
    if known and low < high:
        line += f"  [{low:.4f}, {high:.4f}] at 95 %"
    elif known:
        line += "  exact" if metric["source"] == "files" else "  exact, on a fixed set"
    if metric["unit"] == "fraction" and known:
        line += f"  {bar(metric['value'], low, high)}"
    if metric["source"] != "files":
        line += f"  n={metric['examples']} on {metric['source']}, {metric['tokens']} tokens"
    loss = metric.get("against")
    if not loss:
        return [line]
    if metric["unit"] == "bytes":
        return [line, f"  against {against}: {loss['loss'] / 1e6:+.1f} MB"]
    shown = f"{loss['loss']:+.5f} [{loss['lower']:+.5f}, {loss['upper']:+.5f}] {metric['unit']}"
    return [line, f"  against {against}: {shown}"]


def bar(value: float, low: float, high: float) -> str:
    """A share between 0 and 1 with its interval, drawn with characters.

    >>> bar(0.5, 0.25, 0.75)
    '|-----======O======------|'
    """

    def at(x: float) -> int:
        return min(_BAR - 1, max(0, int(x * (_BAR - 1))))

    cells = ["=" if at(low) <= i <= at(high) else "-" for i in range(_BAR)]
    cells[at(value)] = "O"
    return f"|{''.join(cells)}|"
