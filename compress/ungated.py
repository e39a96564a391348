"""Exporting a model without a run: the very weights, read back bit for bit, with nothing proven about their loss."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from compress import artifact, lineage, opening, plugin, provenance, publishing
from compress.encodings import EncodedTensor, Encoding
from compress.errors import RecipeError
from compress.exporting import write_exactly
from compress.interfaces import Exporter
from compress.lineage import Lineage
from compress.provenance import facts
from compress.record import FileRecord
from compress.report.zeros import sentence
from compress.validation import validated
from compress.yaml_nodes import Document, apply_set
from compress.zeros import Zeros, measure, pruned

if TYPE_CHECKING:
    from compress.model import Model


_MEASURES = "perplexity,divergence"


class Exported(BaseModel):
    """What was written. model, origin: what it was made of. gated: never; `hint` says how to measure and gate.

    zeros: what they bring the files, where weights were pruned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    params: dict[str, Any]
    model: str
    origin: str
    path: str
    files: list[FileRecord]
    size_bytes: int
    bits_per_weight: float
    weights_exact: Literal[True] = True
    gated: Literal[False] = False
    zeros: Zeros | None = None
    hint: str


def export(model: str | Path | Model, format: str, out: str | Path, /, **fields: Any) -> Exported:
    """Write a model in a format ("gguf", "onnx", …) into the new folder `out`, and read every tensor back.

    model: an open model, or what `opening.locate` finds (a run stands for its final model). fields: those of
    the exporter, as a recipe's `export` takes them. No gate looks at the files: see `Exported.hint`. On any
    failure nothing is left. Raises RecipeError for an `out` that exists, unknown fields, and encodings or
    architectures that the format cannot hold; Corrupt where the files do not hold the very weights.
    """
    return write(model, configured(format, fields), out)


def configured(format: str, fields: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Exporter:
    """The exporter of a format with its fields; overrides: FIELD=VALUE, as `--set` takes them."""
    kind = plugin.exporter(format)
    given = dict(fields or {})
    document = Document("export", given, {(name,): "export" for name in given})
    for assignment in overrides:
        apply_set(document, assignment)
    return validated(document, kind, document.value, (), "exporter")


def write(
    model: str | Path | Model, exporter: Exporter, out: str | Path, say: Callable[[str], None] = lambda line: None
) -> Exported:
    """`export` with an exporter at hand; say: told what is being done."""
    folder = Path(out).expanduser()
    _require_new(folder)
    opened, origin = _opened(model, say)
    try:
        exporter.check(opened.facts)
        _require_encodings(opened, exporter)
        known = _lineage(opened, origin)
        opened.described = asdict(known)
        say(f"writing {exporter.name}, and reading it back")
        with publishing.staging(folder) as staging:
            files = write_exactly(opened, exporter, staging / folder.name)
            size, bits = sum(f.bytes for f in files), artifact.bits_per_weight(opened)
            brought = _brought_by_zeros(opened, exporter, staging / folder.name, say)
            account = facts.of_model(opened, exporter, size, bits, origin.spec, known, brought)
            files = provenance.attach(staging / folder.name, account, files)
            _require_new(folder)  # by now another process may have made it
            publishing.publish(staging / folder.name, folder)
    finally:
        if opened is not model:
            opened.close()
    return Exported(
        format=exporter.name,
        params=exporter.model_dump(mode="json"),
        model=origin.spec,
        origin=origin.description,
        path=str(folder),
        files=files,
        size_bytes=size,
        bits_per_weight=bits,
        zeros=brought,
        hint=_hint(folder, origin.baseline, exporter.name, "label_divergence" if opened.labels else _MEASURES),
    )


def lines(made: Exported) -> list[str]:
    """What was written, for a reader."""
    found = [f"{Path(made.path) / f.name}  {f.bytes / 1e6:.1f} MB  sha256 {f.sha256[:12]}…" for f in made.files]
    size = f"{made.size_bytes / 1e6:.1f} MB, {made.bits_per_weight:.2f} bits per weight, weights exact"
    brought = [sentence(made.zeros)] if made.zeros else []
    return [*found, f"{made.format} of {made.model} ({made.origin}): {size}", *brought, f"NOT GATED: {made.hint}"]


def _brought_by_zeros(model: Model, exporter: Exporter, written: Path, say: Callable[[str], None]) -> Zeros | None:
    if not pruned(model):
        return None
    say(f"measuring what pruned zeros bring {exporter.name}")
    return measure(model, exporter, written)


def _opened(model: str | Path | Model, say: Callable[[str], None]) -> tuple[Model, opening.Origin]:
    if not isinstance(model, str | Path):
        model.touch()  # whoever holds it may have changed its weights by hand
        return model, opening.Origin(f"sha256:{model.digest}", None, "MODEL", "an open model")
    origin = opening.locate(str(model))
    say(f"opening {origin.spec}: {origin.description}")
    return opening.load_from(origin), origin


def _lineage(model: Model, origin: opening.Origin) -> Lineage:
    """That of the source, or of a run's baseline; an artifact and an open model have a name alone."""
    named = origin.artifact is None or origin.baseline != origin.spec
    return lineage.of_spec(origin.baseline) if named and origin.baseline != "MODEL" else Lineage(model.name)


def _require_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise RecipeError(f"{folder} exists already, and an export replaces nothing; give a new folder, or remove it")


def _require_encodings(model: Model, exporter: Exporter) -> None:
    """Refuse, before anything is written, tensors that the format cannot hold exactly."""
    matrices, encodings = model.facts.matrices, dict[str, Encoding]()
    for name, tensor in model.tensors():
        encoded = isinstance(tensor, EncodedTensor)
        encoding = tensor.encoding if isinstance(tensor, EncodedTensor) else Encoding("fp32")
        if encoded or name in matrices:
            encodings[name] = encoding
        if name in encodings and (reason := exporter.refuses(encoding, name)):
            raise RecipeError(f"export {exporter.name}: {reason}")
    if reason := exporter.refuses_together(encodings):
        raise RecipeError(f"export {exporter.name}: {reason}")


def _hint(folder: Path, baseline: str, format: str, measures: str) -> str:
    measured = shlex.join(["compress", "eval", str(folder), "--against", baseline, "--with", measures])
    return (
        f"the files hold the very weights, and nothing is proven about their loss; `{measured}` measures it; "
        f"a recipe with `export: [{format}: {{}}]` gates it"
    )
