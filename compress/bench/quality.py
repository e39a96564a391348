"""What an artifact's manifest says of its quality: the losses that its own gate measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compress import provenance, sealing

ORDER = ("divergence", "perplexity")  # what a chart shows, where every artifact has it


class Quality(BaseModel):
    """A loss against the base model, with the bounds of the gate; of several sources the worst one's."""

    model_config = ConfigDict(frozen=True)

    metric: str
    unit: str
    source: str
    loss: float
    lower: float
    upper: float
    base: str  # digest of the model that the loss is measured against


def folder_of(spec: str) -> Path | None:
    """The folder that an artifact's manifest would lie in; None for what is no path."""
    path = Path(spec).expanduser()
    return path if path.is_dir() else path.parent if path.is_file() else None


def manifest(spec: str) -> dict[str, Any] | None:
    """The manifest of an export, or None where there is none; raises Corrupt where it was changed."""
    folder = folder_of(spec)
    if folder is None or not (folder / sealing.FILE).is_file():
        return None
    facts = sealing.read(folder)
    return facts if facts.get("schema") == provenance.SCHEMA else None


def of(spec: str) -> list[Quality]:
    """The losses on record; none where nothing was gated."""
    facts = manifest(spec)
    if facts is None or not facts["gates"]:
        return []
    worst: dict[str, Quality] = {}
    for check in facts["gates"]["artifact"]["checks"]:
        if check["against"] != "baseline" or None in (check["loss"], check["lower"], check["upper"]):
            continue
        kept = {name: check[name] for name in ("metric", "unit", "source", "loss", "lower", "upper")}
        found = Quality(**kept, base=facts["base_model"]["digest"])
        if found.metric not in worst or found.loss > worst[found.metric].loss:
            worst[found.metric] = found
    return list(worst.values())


def common(found: Sequence[Sequence[Quality]]) -> tuple[str, str] | None:
    """The metric and base model that most artifacts share, divergence before others; None where none has any."""
    counted: dict[tuple[str, str], int] = {}
    for own in found:
        for q in own:
            counted[q.metric, q.base] = counted.get((q.metric, q.base), 0) + 1

    def rank(key: tuple[str, str]) -> tuple[int, int]:
        return -counted[key], ORDER.index(key[0]) if key[0] in ORDER else len(ORDER)

    return min(counted, key=rank) if counted else None
