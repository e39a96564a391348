"""What ships beside an artifact's weights: what it is, what was proven about it, and how to check both.

compression.json   recipe; digests of model, data, code and files; gate verdicts; versions; sealed
README.md          a model card with the hub's front matter
bom.json           a CycloneDX ML-BOM

Nothing here depends on when or how fast a run was, or on how often it was interrupted: equal runs ship equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import artifact, sealing
from compress.errors import Corrupt, RecipeError
from compress.provenance import bom, card
from compress.record import FileRecord

SCHEMA = "compress.export/1"
FILES = (card.FILE, bom.FILE, sealing.FILE)


def attach(folder: Path, facts: Mapping[str, Any], files: list[FileRecord]) -> list[FileRecord]:
    """Write the three files into an exported folder; the records of all of its files, by name.

    files: those that the exporter wrote. Raises RecipeError where it used one of the three names.
    """
    if taken := sorted({f.name for f in files} & set(FILES)):
        raise RecipeError(f"export {facts['format']}: the exporter wrote {taken[0]}, which compress writes itself")
    described = {**facts, "schema": SCHEMA, "files": _described(files)}
    (folder / bom.FILE).write_text(bom.render(described), encoding="utf-8")
    (folder / card.FILE).write_text(card.render(described), encoding="utf-8")
    listed = [*files, *(record_of(folder, name) for name in (bom.FILE, card.FILE))]
    sealing.write(folder, {**described, "files": _described(listed)})
    return sorted([*listed, record_of(folder, sealing.FILE)], key=lambda f: f.name)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder; raises Corrupt where it is missing, changed, or not an export's."""
    facts = sealing.read(folder)
    if facts.get("schema") != SCHEMA:
        raise Corrupt(f"{folder}: schema {facts.get('schema')!r}, expected {SCHEMA!r}")
    return facts


def record_of(folder: Path, name: str) -> FileRecord:
    """A file's name, size and digest."""
    path = folder / name
    return FileRecord(name=name, bytes=path.stat().st_size, sha256=artifact.file_sha256(path))


def _described(files: list[FileRecord]) -> dict[str, Any]:
    return {f.name: {"bytes": f.bytes, "sha256": f.sha256} for f in files}
