"""The user's JSON lines: one object per line, every complaint with file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import Corrupt, RecipeError
from compress.interfaces import Documents


def check_source(data: str) -> None:
    """Raises ValueError, for pydantic, where a source names no file."""
    if not data.startswith("file:"):
        raise ValueError(f"data={data!r}; expected file:PATH of JSON lines")


def path_of(data: str) -> Path:
    """The path of a source `file:PATH`."""
    return Path(data.removeprefix("file:")).expanduser()


def content(path: Path) -> bytes:
    """What the file holds; RecipeError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"data source file:{path}: cannot be read ({error.strerror})") from None


def digest(data: str) -> str:
    """sha256 of the file's bytes."""
    return hashlib.sha256(content(path_of(data))).hexdigest()


def rows(path: Path, wanted: str, key: str = "id") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place (path:line), id (the row's, else the line's number) and object of each line that is not blank.

    wanted: what a line should be, for messages. key: the field of the id. Raises RecipeError for another line, an id
    that occurs twice and an empty file, Corrupt for what is no UTF-8.
    """
    try:
        lines = content(path).decode("utf-8").split("\n")  # other line separators may stand inside a JSON text
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path}: not UTF-8 at byte {error.start}") from None
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise RecipeError(f"{where}: {wanted}, found {line[:40]!r}")
        name = str(row.get(key, number))
        if name in seen:
            raise RecipeError(f"{where}: the id {name!r} occurs twice; ids must be unique")
        seen.add(name)
        yield where, name, row
    if not seen:
        raise RecipeError(f"data source file:{path} is empty; {wanted} per line")


def once(where: str, text: str, seen: dict[str, str], what: str, remedy: str) -> None:
    """Raises RecipeError for a text that an earlier row has, but for blanks: examples count as independent evidence."""
    words = " ".join(text.split())
    if words in seen:
        raise RecipeError(f"{where}: repeats the {what} of line {seen[words]}; {remedy}")
    seen[words] = where.rpartition(":")[2]


def documents(source: str, found: Mapping[str, str], salt: str = "") -> Documents:
    """Rows as documents (id → text), in a random order that depends on their ids alone.

    salt: what else decides scores, a library's version say; a part of the digest.
    """
    pairs = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return Documents(source, pairs, hashlib.sha256(json.dumps([salt, pairs]).encode()).hexdigest())
