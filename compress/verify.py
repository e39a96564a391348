"""Re-checking digests: of an artifact, of an exported folder, or of everything that a run published."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from compress import artifact, data, provenance, recipe, recipe_data, record, sealing, source
from compress.errors import CompressError, Corrupt, RecipeError


def verify(path: Path) -> list[str]:
    """Compare every file with the digest on record; a line for each folder that holds what it should.

    path: an artifact's folder, an exported folder or its .gguf, a run's folder (or run.json), or a folder in it. Of a
    run, a line also says whether its model and its data are still what it saw; they may change, its files may not.
    Raises Corrupt naming the first file that differs, RecipeError where nothing has a digest.
    """
    folder = path.parent if path.is_file() and path.name != record.FILE else path
    if (folder / sealing.FILE).is_file():
        return _sealed(folder)
    run, home, wanted = _recorded(path)
    lines = []
    for export in run.exports:
        place = home / export.path
        if not export.path or not place.resolve().is_relative_to(wanted):
            continue
        for file in export.files:
            artifact.check_file(place, file.name, file.sha256)
        lines.append(f"{place}: {len(export.files)} files match")
        lines += _unlisted(place, {file.name for file in export.files})
    if not lines:
        raise RecipeError(f"{path}: nothing here has a digest on record; {home} published no such export")
    return [*lines, *_origins(run, home)] if wanted == home.resolve() else lines


def _sealed(folder: Path) -> list[str]:
    """Check a folder by its own manifest: an exported one, or an artifact."""
    facts = sealing.read(folder)
    if facts.get("schema") not in (provenance.SCHEMA, artifact.SCHEMA):
        known = f"{provenance.SCHEMA!r} or {artifact.SCHEMA!r}"
        raise Corrupt(f"{folder}: schema {facts.get('schema')!r}, expected {known}")
    for name, file in facts["files"].items():
        artifact.check_file(folder, name, file["sha256"] if isinstance(file, dict) else file)
    names = [*facts["files"], sealing.FILE]
    return [f"{folder}: {len(names)} files match", *_unlisted(folder, names)]


def _recorded(path: Path) -> tuple[record.RunRecord, Path, Path]:
    """The record that speaks of `path`, its folder, and the folder below which its exports are asked for."""
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder")
    whole = path.resolve()
    if path.name == record.FILE:
        return *record.read(path), whole.parent
    for folder in (path, *whole.parents[:2]):  # a run, its artifacts/, or artifacts/<format>
        if whole.is_dir() and (folder / record.FILE).is_file():
            return *record.read(folder), whole
    raise RecipeError(f"{path}: neither {sealing.FILE} nor {record.FILE} is here, and no {record.FILE} above")


def _origins(run: record.RunRecord, folder: Path) -> list[str]:
    """Whether the model and the data of a run are what they were; what is not on this machine is not looked for."""
    try:
        asked = recipe.load(folder / "recipe.resolved.yaml")
        manifests = [provenance.read(folder / e.path) for e in run.exports if e.path]
    except CompressError as error:
        return [f"model and data not checked: {error}"]
    lines = [_model(m["base_model"]) for m in manifests[:1]]
    hub = [part["source"] for part in run.data if str(part["source"]).startswith("hub:")]
    try:
        found = [] if hub else data.split(recipe_data.requests(asked), asked.seed)
    except CompressError as error:
        return [*lines, f"data not checked: {error}"]
    lines += [f"data {name}: not downloaded, not checked" for name in dict.fromkeys(hub)]
    for part, split in zip(run.data, found):
        same = part["digest"] == split.digest
        lines.append(f"data {part['source']} ({part['role']}): {_WORDS[same]}")
    return lines


_WORDS = {True: "as the run saw it", False: "NOT what the run saw"}


def _model(base: dict[str, str]) -> str:
    name = f"model {base['source']}"
    try:
        found = source.resolve(base["source"])
    except CompressError as error:
        return f"{name}: not checked: {error}"
    if found.path is None:
        return f"{name}: not downloaded, not checked"
    return f"{name}: {_WORDS[source.digest(found) == base['files']]}"


def _unlisted(folder: Path, listed: Iterable[str]) -> list[str]:
    """A line for each file that has no digest: nothing is known of it."""
    here = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    signed = f"{folder / sealing.SIGNATURE}: a signature, which `compress verify {folder} --key KEY` checks"
    lines = [f"{folder / name}: in no record, not checked" for name in sorted(here - {*listed, sealing.SIGNATURE})]
    return [*lines, signed] if sealing.SIGNATURE in here else lines
