"""What a shell completes: recipes, formats and evaluators. Asked at every press of Tab: no model library loads."""

from __future__ import annotations

from pathlib import Path

Choices = list[tuple[str, str]]
"""What a word may become, each with a line of help (shown by zsh and fish)."""


def recipes(incomplete: str) -> Choices:
    """Shipped recipes by name, and recipe files (and the folders on the way) that start so."""
    from compress import recipe

    shipped = [(name, text) for name, text in recipe.shipped().items() if name.startswith(incomplete)]
    return shipped + _files(incomplete, (".yaml", ".yml"))


def artifacts(incomplete: str) -> Choices:
    """GGUF files, and folders."""
    return _files(incomplete, (".gguf",), "a GGUF file")


def formats(incomplete: str) -> Choices:
    """Names of exporters, third parties' too."""
    return [(name, "") for name in _names("exporter") if name.startswith(incomplete)]


def evaluators(incomplete: str) -> Choices:
    """Names of evaluators, the last of a list that commas separate."""
    before, comma, last = incomplete.rpartition(",")
    return [(before + comma + name, "") for name in _names("evaluator") if name.startswith(last)]


def _names(kind: str) -> tuple[str, ...]:
    from compress import plugin

    return plugin.names(kind)


def _files(incomplete: str, suffixes: tuple[str, ...], kind: str = "a recipe file") -> Choices:
    folder, _, start = incomplete.rpartition("/")
    place = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".")
    try:
        found = sorted(path for path in place.iterdir() if path.name.startswith(start))
    except OSError:  # no such folder: nothing to complete
        return []
    prefix = incomplete[: len(incomplete) - len(start)]
    shown = [path for path in found if start.startswith(".") or not path.name.startswith(".")]
    files = [(prefix + path.name, kind) for path in shown if path.suffix in suffixes and path.is_file()]
    return files + [(f"{prefix}{path.name}/", "a folder") for path in shown if path.is_dir()]
