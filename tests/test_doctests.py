"""Every example in a docstring says what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import compress
import evaluators
import export

MODULES = [
    module.name
    for package in (compress, evaluators, export)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]
# Where examples say what words cannot: at least so many.
EXAMPLES = {
    "compress.bench": 2,
    "compress.errors": 1,
    "compress.pairs": 3,
    "compress.provenance.facts": 1,
    "compress.requirements": 1,
    "compress.sealing": 1,
}


@pytest.mark.parametrize("name", MODULES)
def test_documented_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert not found.failed and found.attempted >= EXAMPLES.get(name, 0)


def test_modules_with_examples_are_found() -> None:
    assert EXAMPLES.keys() <= set(MODULES)
