"""Finding plug-ins by name: shipped ones by their path, third-party ones by entry point.

`quantize.rtn` is the class with `name = "quantize.rtn"` in compress/steps/quantize/rtn.py; an entry point in
the group `compress.steps`, `compress.evaluators` or `compress.exporters` with the full name adds another.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

from compress.errors import RecipeError, one_line
from compress.interfaces import Evaluator, Exporter, Plugin, Step

P = TypeVar("P", bound=Plugin)

_ROOTS = {"step": "compress.steps", "evaluator": "evaluators", "exporter": "export"}
_BASES: dict[str, type[Plugin]] = {"step": Step, "evaluator": Evaluator, "exporter": Exporter}
_REQUIRED = {"step": (), "evaluator": ("unit", "definition"), "exporter": ("runtime", "extra")}  # class variables


def step(name: str) -> type[Step]:
    """The step class called `name`; raises RecipeError with the nearest known names."""
    return _find("step", name, Step)  # type: ignore[type-abstract]


def evaluator(name: str) -> type[Evaluator]:
    """The evaluator class called `name`; raises RecipeError with the nearest known names."""
    return _find("evaluator", name, Evaluator)  # type: ignore[type-abstract]


def exporter(name: str) -> type[Exporter]:
    """The exporter class called `name`; raises RecipeError with the nearest known names."""
    return _find("exporter", name, Exporter)  # type: ignore[type-abstract]


@cache
def names(kind: str) -> tuple[str, ...]:
    """Every known name of a kind ("step", "evaluator", "exporter"), sorted."""
    return tuple(sorted({*_shipped(kind), *_third_party(kind)}))


def summary(kind: str, name: str) -> str:
    """The first line of a plug-in's docstring; of one that cannot be used, why."""
    try:
        text = _find(kind, name, _BASES[kind]).__doc__ or ""
    except RecipeError as error:
        return f"cannot be used: {error}"
    return "".join(text.strip().splitlines()[:1])


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """A hint for a misspelt word, or the list of what is known."""
    sure = difflib.get_close_matches(word, known, n=1, cutoff=0.9)
    close = sure or difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not close:  # a bare last component is the commonest slip: "rtn" for "quantize.rtn"
        close = [name for name in known if name.rsplit(".", 1)[-1] == word]
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


def _find(kind: str, name: str, base: type[P]) -> type[P]:
    module, entries = _shipped(kind).get(name), _third_party(kind).get(name, [])
    if len(entries) + (module is not None) > 1:
        origins = ["compress" for _ in [module] if module] + [_origin(entry) for entry in entries]
        raise RecipeError(f"{kind} {name!r} is offered by {' and by '.join(origins)}; rename or uninstall one")
    if module is not None:
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and issubclass(value, base) and vars(value).get("name") == name:
                return value
        raise TypeError(f"{module} defines no {kind} with name = {name!r}")
    if entries:
        return _loaded(kind, entries[0], base)
    raise RecipeError(f"unknown {kind} {name!r}; {nearest(name, names(kind))}")


def _loaded(kind: str, entry: EntryPoint, base: type[P]) -> type[P]:
    """The class that a third party's entry point names, checked as far as a class alone shows."""
    where = f"{kind} {entry.name!r} of {_origin(entry)}"
    try:
        value = entry.load()
    except Exception as error:  # a third party's module may fail in any way
        raise RecipeError(f"{where} cannot be imported: {one_line(error)}") from error
    if not (isinstance(value, type) and issubclass(value, base)):
        raise RecipeError(f"{where} is no subclass of compress.interfaces.{base.__name__}")
    if vars(value).get("name") != entry.name:
        raise RecipeError(f"{where} has name = {vars(value).get('name')!r}, expected the entry point's {entry.name!r}")
    missing = sorted(value.__abstractmethods__) + [a for a in _REQUIRED[kind] if not hasattr(value, a)]
    if missing:
        raise RecipeError(f"{where} does not define {', '.join(missing)}")
    return value


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})"


@cache
def _shipped(kind: str) -> dict[str, str]:
    """Name → module of the files of a room; a file that starts with an underscore is a helper."""
    spec = importlib.util.find_spec(_ROOTS[kind])
    assert spec is not None and spec.submodule_search_locations
    found = {}
    for folder in map(Path, spec.submodule_search_locations):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if not any(part.startswith("_") for part in parts):
                found[".".join(parts)] = ".".join((_ROOTS[kind], *parts))
    return found


@cache
def _third_party(kind: str) -> dict[str, list[EntryPoint]]:
    """Name → the entry points that offer it; more than one is an error for whoever asks for that name."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"compress.{kind}s"):
        found.setdefault(entry.name, []).append(entry)
    return found
