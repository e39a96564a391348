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


@pytest.mark.parametrize("name", MODULES)
def test_documented_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
