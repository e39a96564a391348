"""Runtimes that are installed and too old are refused in the plan, before weights load."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from compress import requirements
from compress.errors import RecipeError
from compress.plugin import exporter
from tests.tiny import tiny_model

CASES = {
    "llama-cpp-python": ("gguf", {}),
    "onnxruntime-genai": ("onnx", {}),
    "onnxruntime": ("onnx", {"flavour": "portable"}),
    "compressed-tensors": ("checkpoint", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_old_runtime_is_refused_with_both_versions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = CASES[name]
    made, facts = exporter(kind)(**fields), tiny_model(hidden_size=64, head_dim=16).facts
    made.check(facts)  # what is installed here is new enough
    (wanted,) = [w for w in requirements.wanted() if w.name == name]
    real = metadata.version

    def version(asked: str) -> Any:
        return "0.0.1" if asked == name else real(asked)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(RecipeError, match=f"{kind}: {name} 0.0.1 is older than {wanted.minimum}[:;] pip install"):
        made.check(facts)


def test_what_is_not_installed_is_not_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "wanted", lambda: [requirements.Wanted("no-such-runtime", "x", "1")])
    assert requirements.outdated(["no-such-runtime"]) is None
