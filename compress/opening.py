"""Opening a model in torch, whatever holds it: a finished run, an artifact, a package, a file, a folder or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress import artifact, record, sealing, source
from compress.errors import RecipeError
from compress.store import Store

if TYPE_CHECKING:
    from compress.model import Model

GRAPHS = ("model.onnx", "decoder_model.onnx")  # one of which an ONNX export has


@dataclass(frozen=True)
class Origin:
    """Where a model's weights are, and what is known of it.

    artifact: its folder; None for what `source.load` opens. baseline: what to measure losses against.
    """

    spec: str
    artifact: Path | None
    baseline: str
    description: str


def locate(spec: str, store: Store | None = None) -> Origin:
    """Find what `spec` names, without opening it: a run (folder or run.json), an artifact, or a source.

    Raises RecipeError where a run's model is not in the store (any longer), or where `spec` is an export.
    """
    path = Path(spec).expanduser()
    if (path / record.FILE).is_file() or (path.is_file() and path.name == record.FILE):
        return _of_run(spec, path, store or Store())
    if (path / artifact.MANIFEST).is_file() and not _ships(path):
        return Origin(spec, path, spec, "an artifact")
    other = path.is_dir() and not (path / "config.json").is_file() and [*path.glob("*.gguf"), *path.glob("*.onnx")]
    if other or any((path / name).is_file() for name in GRAPHS):
        raise RecipeError(f"{spec} is an export; give the model that it was made from: a run, an artifact or a source")
    return Origin(spec, None, spec, "a source model")


def _ships(folder: Path) -> bool:
    """Whether the manifest is that of an export, which lies beside whatever the exporter wrote."""
    return str(sealing.read(folder).get("schema")).startswith("compress.export/")


def load(spec: str | Path, dtype: str = "float32", store: Store | None = None) -> Model:
    """Open what `spec` names in torch: see `locate`, and `source.load` for packages, files, folders and the hub.

    A run stands for the model that its last accepted step left. dtype: "float32" or "bfloat16", of matrix
    products. Raises RecipeError, NetworkError, UnsafeInput or Corrupt, each naming the file.
    """
    return load_from(locate(str(spec), store), dtype)


def load_from(origin: Origin, dtype: str = "float32") -> Model:
    """Open what was located; every file of an artifact is checked against its digest first."""
    if origin.artifact is None:
        return source.load(origin.spec, dtype)
    artifact.verify(origin.artifact)
    return artifact.load(origin.artifact, dtype)


def _of_run(spec: str, path: Path, store: Store) -> Origin:
    """The artifact that the last accepted step of a run left in the store."""
    run, folder = record.read(path)
    accepted = [step for step in run.steps if step.gate is None or step.gate.verdict == "PASS"]
    if not accepted or run.baseline is None:
        raise RecipeError(f"{spec}: this run accepted no step ({run.status}); give its model, or another run")
    step, verdict = accepted[-1], run.release.verdict if run.release else "none"
    found = store.find(step.digest)
    name = f"steps[{len(accepted) - 1}] {step.name}"
    if found is None:
        recipe = folder / "recipe.resolved.yaml"
        raise RecipeError(
            f"{spec}: what {name} made (digest {step.digest[:12]}…) is not in the store {store.root}: removed, or the "
            f"run used another $COMPRESS_HOME; make it anew with `compress apply {recipe} --run-dir NEW`, give NEW"
        )
    return Origin(spec, found, run.baseline.model, f"what {name} left; run {run.status}, release gate {verdict}")
