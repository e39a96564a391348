"""Round to nearest: scales and codes of both ranges by hand, and which encoding a tensor gets."""

import pytest
import torch

from compress.encodings import Encoding
from compress.interfaces import Context
from compress.plugin import step
from tests.tiny import tiny_model

UP = "model.layers.{}.mlp.up_proj"


def half(x: float) -> float:
    return float(torch.tensor(x).half())


def by_hand(w: list[float], search: bool) -> tuple[float, list[int]]:
    """Scale and int4 codes of a group: min-max, or the best of it and 19 scales around it, fitted to their codes."""
    top = max(w, key=abs)
    best, least = 0.0, float("inf")
    for i in range(-1, 19 if search else 0):
        s = half(top / -8.0 if i < 0 else top / (-8.0 - (-0.9 + 0.1 * i)))
        codes = [min(max(round(x / s), -8), 7) for x in w]
        if i >= 0:
            s = half(sum(x * c for x, c in zip(w, codes)) / sum(c * c for c in codes))
        error = sum((x - c * s) ** 2 for x, c in zip(w, codes))
        if error < least:
            best, least = s, error
    return best, [min(max(round(x / best), -8), 7) for x in w]


@pytest.mark.parametrize("fields", [{}, {"range": "minmax"}, {"range": "mse"}])
def test_both_ranges_are_those_by_hand(fields):
    model = tiny_model()
    step("quantize.rtn")(group_size=16, embeddings="int4", **fields).apply(model, Context(seed=0))
    for name in (f"{UP.format(1)}.weight", "lm_head.weight"):
        W, stored = tiny_model().parameter(name).detach(), model.encoded[name]
        found = [by_hand(w, fields.get("range") == "mse") for w in W.view(-1, 16).tolist()]
        # float32 against float64: two scales may be equally good, or a weight lie on an edge
        same = stored.scales.flatten() == torch.tensor([s for s, _ in found])
        assert same.float().mean() > 0.99, name
        codes = torch.tensor([c for _, c in found])
        assert (stored.codes.view(-1, 16) == codes)[same].float().mean() > 0.999, name


def test_of_overlapping_patterns_the_last_counts():
    facts, name = tiny_model().facts, UP.format(0)
    table = {"*.mlp.*": "int8", "*.0.*": "int3", name: "fp16", "*": "int5"}
    for first in range(4):  # each of them comes last once
        order = list(table)[first:] + list(table)[:first]
        chosen = step("quantize.rtn")(group_size=16, keep={pattern: table[pattern] for pattern in order})
        assert chosen.encodings(facts)[f"{name}.weight"].name == table[order[-1]]
    partly = step("quantize.rtn")(group_size=16, keep={"*.mlp.*": "int8", "*.0.*": "int3"}).encodings(facts)
    assert partly[f"{UP.format(1)}.weight"] == Encoding("int8", 16)
    assert partly["model.layers.0.self_attn.q_proj.weight"] == Encoding("int3", 16)
    assert partly["model.layers.1.self_attn.q_proj.weight"] == Encoding("int4", 16)
