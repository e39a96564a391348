"""Bits per byte: a plain loop over whole documents, and what weighs them."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError

from compress.errors import GateInconclusive, RecipeError
from compress.gate import Gate
from compress.interfaces import Documents
from compress.measure import evaluate
from compress.model import Model
from evaluators.bits_per_byte import BitsPerByte
from tests import tiny_gguf
from tests.tiny import documents, perturbed, tiny_model

CHECK = BitsPerByte(max_increase=0.02)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_gguf.tiny()


def test_it_equals_a_plain_loop_that_predicts_every_token_of_a_document(model):
    data = Documents("s", [("a", "the model is small"), ("b", "größer als 你好")], "d", 64)
    scores = CHECK.score(model, CHECK.examples(data, CHECK.encoder(model)))
    bits = 0.0
    for score, (_, text) in zip(scores, data.documents, strict=True):
        ids = torch.tensor([[min(model.eos_ids) if model.bos_id is None else model.bos_id, *model.encode(text)]])
        with torch.no_grad():
            loss = model.module(input_ids=ids, labels=ids).loss.item()  # mean over len - 1 positions
        want = loss * (ids.shape[1] - 1) / math.log(2)
        assert score.total == pytest.approx(want, rel=1e-5)
        assert score.weight == len(text.encode("utf-8"))
        bits += want
    assert scores[1].weight == 8 + 1 + 3 + 1 + 6  # ö and ß take two bytes, each Chinese character three
    assert CHECK.value(scores) == pytest.approx(bits / (18 + 19), rel=1e-5)


def test_each_token_is_predicted_once_whatever_the_length_of_windows(model):
    (text,) = [text for _, text in documents(1).documents]
    tokens = model.encode(text)
    for length in (2, 3, 7, len(tokens), len(tokens) + 1, 64):
        (example,) = CHECK.examples(Documents("s", [("a", text)], "d", length), CHECK.encoder(model))
        size, windows = example.payload
        assert size == len(text) and [t for w in windows for t in w[1:]] == tokens
        assert all(len(w) <= length for w in windows)
        assert all(a[-1] == b[0] for a, b in zip(windows, windows[1:]))


def test_a_document_of_one_token_counts_and_an_empty_one_does_not(model):
    data = Documents("s", [("empty", ""), ("one", "a")], "d", 8)
    (example,) = CHECK.examples(data, CHECK.encoder(model))
    assert example.id == "one" and example.payload[0] == 1


def test_a_worse_model_fails_and_a_twin_passes(model):
    data = [documents(120)]
    (worse,) = Gate((CHECK,)).evaluate(perturbed(model, 0.5), model, data).checks
    assert worse.verdict == "FAIL" and worse.loss > CHECK.margin and worse.unit == "bits per byte"
    twin = Model(copy.deepcopy(model.module), model.tokenizer)
    (same,) = Gate((CHECK,)).evaluate(twin, model, data).checks
    assert same.verdict == "PASS" and same.loss == 0


def test_what_cannot_be_measured_is_said(model):
    with pytest.raises(GateInconclusive, match="no token to stand before"):
        CHECK.examples(documents(2), CHECK.encoder(tiny_model()))
    with pytest.raises(RecipeError, match="at least 2"):
        CHECK.examples(documents(2, length=1), CHECK.encoder(model))
    with pytest.raises(RecipeError, match="weighs whole documents"):
        evaluate(model, ["bits_per_byte"], windows=3)
    for margin in (0, -1, 9, math.inf, math.nan):
        with pytest.raises(ValidationError):
            BitsPerByte(max_increase=margin)
