"""The optional distributions that the project's own metadata asks for, and whether those installed are new enough."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata

PROJECT = "compress-toolkit"
_DEVELOPMENT = "dev"


@dataclass(frozen=True)
class Wanted:
    """An optional distribution, the group of extras that brings it, and the least version."""

    name: str
    group: str
    minimum: str


def wanted() -> list[Wanted]:
    """The optional distributions, as the installed project's own metadata lists them; none of one not installed."""
    found = []
    for line in metadata.requires(PROJECT) or [] if _version(PROJECT) else []:
        if extra := re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", line):
            name = re.match(r"[\w.-]+", line)
            minimum = re.search(r">=\s*([\d.]+)", line)
            assert name is not None
            found.append(Wanted(name[0], extra[1], minimum[1] if minimum else "0"))
    return [w for w in found if w.group != _DEVELOPMENT]


def is_older(version: str, minimum: str) -> bool:
    """Whether a version is below the least one, by its first three numbers.

    >>> is_older("1.9.2", "1.23"), is_older("0.18.0rc1", "0.18")
    (True, False)
    """
    return _numbers(version) < _numbers(minimum)


def outdated(names: Collection[str]) -> str | None:
    """Which of these optional distributions is installed and too old, with both versions; None where none is."""
    for package in wanted():
        version = _version(package.name) if package.name in names else None
        if version is not None and is_older(version, package.minimum):
            return f"{package.name} {version} is older than {package.minimum}"
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None  # whoever needs it says so


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
