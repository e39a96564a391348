"""Re-checking digests: of an artifact, of an exported folder, or of everything that a run published."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from compress import artifact, record
from compress.errors import Corrupt, RecipeError


def verify(path: Path) -> list[str]:
    """Compare every file with the digest on record; a line for each folder that holds what it should.

    path: an artifact's folder, a run's folder (or run.json), or a folder that a run exported, in its place.
    Raises Corrupt naming the first file that differs, RecipeError where nothing has a digest.
    """
    if (path / artifact.MANIFEST).is_file():
        artifact.verify(path)
        files = artifact.manifest(path)["files"]
        return [f"{path}: {len(files)} files match", *_unlisted(path, {*files, artifact.MANIFEST})]
    run, folder, wanted = _recorded(path)
    lines = []
    for export in run.exports:
        place = folder / export.path
        if not export.path or not place.resolve().is_relative_to(wanted):
            continue
        for file in export.files:
            _check(place / file.name, file.sha256)
        lines.append(f"{place}: {len(export.files)} files match")
        lines += _unlisted(place, {file.name for file in export.files})
    if not lines:
        raise RecipeError(f"{path}: nothing here has a digest on record; {folder} published no such export")
    return lines


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
    raise RecipeError(
        f"{path}: neither {artifact.MANIFEST} nor {record.FILE} is here or above; "
        "an exported folder is verified inside its run, whose record holds the digests"
    )


def _check(file: Path, expected: str) -> None:
    if not file.is_file():
        raise Corrupt(f"{file}: missing (expected sha256 {expected[:12]}…)")
    if (found := artifact.file_sha256(file)) != expected:
        raise Corrupt(f"{file}: sha256 {found[:12]}…, expected {expected[:12]}…")


def _unlisted(folder: Path, listed: Iterable[str]) -> list[str]:
    """A line for each file that has no digest: nothing is known of it."""
    here = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return [f"{folder / name}: in no record, not checked" for name in sorted(here - set(listed))]
