"""Judging a part of a document by a pydantic model; every error is one line: place, found, expected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from compress.errors import RecipeError
from compress.interfaces import Plugin
from compress.plugin import nearest
from compress.yaml_nodes import Document, Path, dotted

M = TypeVar("M", bound=BaseModel)


def validated(document: Document, kind: type[M], fields: Any, path: Path, label: str) -> M:
    """An instance of `kind` from the fields at `path`; null stands for none.

    They are judged as JSON is, so that a list may fill a tuple under strict types.
    """
    label = f"{label} {kind.name}" if issubclass(kind, Plugin) else label
    given = {} if fields is None else fields
    if not isinstance(given, dict):
        raise RecipeError(f"{document.place(path)}  {label}: found {shown(given)}, expected a mapping of fields")
    try:
        return kind.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise _translated(document, error, kind, path, label) from None
    except RecipeError as error:  # a plug-in's own judgement of its fields
        raise RecipeError(f"{document.place(path, key=True)}  {titled(label, str(error))}") from None


def titled(title: str, message: str) -> str:
    """The message behind its title; a plug-in that names itself, as it must where it stands alone, is named once.

    >>> titled("export[0] gguf", "no blocks"), titled("export[0] gguf", "gguf: no blocks")
    ('export[0] gguf: no blocks', 'export[0] gguf: no blocks')
    >>> titled("export[0] gguf", "gguf cannot write it")
    'export[0] gguf cannot write it'
    """
    own = title.rpartition(" ")[2]
    return title + message.removeprefix(own) if message.startswith((f"{own}:", f"{own} ")) else f"{title}: {message}"


def _translated(document: Document, error: ValidationError, kind: Any, path: Path, label: str) -> RecipeError:
    """The first of pydantic's errors in our words; the branches of a union count as one error."""
    grouped: dict[Path, list[Any]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        at = (*path, *detail["loc"])
        while at != path and at not in document.values:
            at = at[:-1]
        grouped.setdefault(at, []).append(detail)
    at, details = next(iter(grouped.items()))
    inner, problem = at[len(path) :], details[0]["type"]
    key = problem in ("extra_forbidden", "missing")
    if problem == "extra_forbidden":
        known = _fields(kind, inner[:-1])
        message = f"unknown key {str(inner[-1])!r}; {nearest(str(inner[-1]), known) if known else 'it has none'}"
        inner = inner[:-1]
    elif problem == "missing":
        message = f"{details[0]['loc'][-1]} is required"
    else:
        message = _expectation(details)
    more = f" (and {len(grouped) - 1} more)" if len(grouped) > 1 else ""
    return RecipeError(f"{document.place(at, key)}  {dotted((label, *inner))}: {message}{more}")


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expectation(details: Sequence[Any]) -> str:
    """What was found and what was expected, from pydantic's errors about one value."""
    expected = [d["msg"].removeprefix("Input should be ").removeprefix("Value error, ") for d in details]
    joiner = ", expected " if all(d["msg"].startswith("Input should be ") for d in details) else ": "
    # A judgement over several fields at once has the whole mapping as its input: not worth repeating.
    whole = details[0]["type"] == "value_error" and isinstance(details[0]["input"], dict)
    found = "" if whole else f"found {shown(details[0]['input'])}{joiner}"
    return " ".join(f"{found}{' or '.join(dict.fromkeys(expected))}".split())


def _fields(kind: Any, inner: Path) -> list[str]:
    """Names of the fields of the model that stands at `inner` inside `kind`."""
    for part in inner:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        models = [a for a in (kind, *get_args(kind)) if isinstance(a, type) and issubclass(a, BaseModel)]
        kind = models[0] if models else None
    return [*kind.model_fields] if isinstance(kind, type) and issubclass(kind, BaseModel) else []
