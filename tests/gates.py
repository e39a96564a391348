"""What tests of gates share: two checks, a tiny baseline, models near to it and far from it, and a cache of scores."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from compress.gate import Gate
from compress.interfaces import Evaluator
from compress.model import Model
from evaluators.divergence import Divergence
from evaluators.perplexity import Perplexity
from tests.tiny import perturbed, tiny_model

PERPLEXITY, DIVERGENCE = Perplexity(max_increase="5%"), Divergence(max_mean=0.08)


@pytest.fixture(scope="module")
def baseline() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def near(baseline: Model) -> Model:
    """Passes both checks."""
    return perturbed(baseline, 0.01)


@pytest.fixture(scope="module")
def far(baseline: Model) -> Model:
    """Fails both checks."""
    return perturbed(baseline, 1.0)


def gate(*checks: Evaluator) -> Gate:
    return Gate(tuple(checks))


def twin_of_equal_scores() -> Model:
    """Other weights than the baseline's without any loss: they differ in a token that never occurs."""
    twin = tiny_model()
    with torch.no_grad():
        twin.parameter("model.embed_tokens.weight")[255] += 1
    twin.touch()
    return twin


def other_tokens() -> Model:
    """A near model that reads "margin" as a token of its own."""
    twin = perturbed(tiny_model(), 0.01)
    twin.tokenizer.add_tokens(["margin"])
    assert twin.encode("a margin") != tiny_model().encode("a margin")
    return twin


class Store(dict):
    """A cache that passes everything through JSON, as files would."""

    hits = 0

    def get(self, key: str) -> Any:
        self.hits += key in self
        return json.loads(self[key]) if key in self else None

    def put(self, key: str, value: Any) -> None:
        self[key] = json.dumps(value, allow_nan=False)
