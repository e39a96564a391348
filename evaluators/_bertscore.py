"""BERTScore: how well the tokens of two texts match in the hidden states of an encoder.

Zhang et al. 2020, arXiv:1904.09675. Every token of the answer is matched with the most similar token of the
reference, by the cosine of their states in one layer: the mean over the answer's tokens is the precision, the mean
over the reference's tokens in the other direction the recall, and F1 their harmonic mean. Departures from the
authors' code: special tokens neither count nor are matched (there, they do not count, but may be matched), each of
the three lies in [0, 1] (there, a mean of negative cosines is negative), and nothing is rescaled with a baseline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import GateInconclusive, RecipeError
from evaluators import _judges

if TYPE_CHECKING:
    from torch import Tensor

FIGURES = {"bertscore": "f1", "bertscore_precision": "precision", "bertscore_recall": "recall"}
"""Metric → which of the three figures it is."""


class BertScore(BaseModel):
    """The encoder that two texts are compared in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    encoder: str = Field(min_length=1)  # a folder of safetensors, or org/name@revision
    layer: int | None = Field(None, ge=1)  # whose output is compared, counted from 1; by default the last
    idf: bool = False  # weigh tokens by how few of the file's references they are in

    def __str__(self) -> str:
        return f"{'the last layer' if self.layer is None else f'layer {self.layer}'} of {self.encoder}"

    def check(self) -> None:
        """Refuse an encoder that is not there, or has too few layers, before weights load; raises RecipeError."""
        if (config := _judges.known_config(self.encoder)) is not None:
            _check_layer(self, config.get("num_hidden_layers"))

    def digest(self) -> str:
        """sha256 of the encoder's files."""
        return _judges.digest(self.encoder)


class _Text(NamedTuple):
    """Tokens of a text without special ones: unit vectors (n, width) float64, and what each counts (n,), sum 1."""

    vectors: Tensor
    weights: Tensor


def scorer(options: BertScore, references: Sequence[str]) -> Callable[[str, Sequence[str]], Mapping[str, float]]:
    """A function of an answer and its references: precision, recall and F1, each that of the best reference.

    references: those of all examples, from which `idf` takes its weights. Raises as `_judges.opened` does, and
    RecipeError where the encoder has fewer layers than `layer` says. The function raises GateInconclusive where the
    encoder's states are not finite.
    """
    judge = _judges.opened("encoder", options.encoder)
    _check_layer(options, judge.module.config.num_hidden_layers)
    idf = _inverse_frequencies(judge, tuple(references)) if options.idf else None

    def judged(answer: str, references: Sequence[str]) -> Mapping[str, float]:
        found = _read(judge, answer, options.layer, idf)
        each = [_match(found, _read(judge, reference, options.layer, idf)) for reference in references]
        return {figure: max(one[figure] for one in each) for figure in FIGURES.values()}

    return judged


def _check_layer(options: BertScore, layers: int | None) -> None:
    if options.layer is not None and layers is not None and options.layer > layers:
        raise RecipeError(f"layer {options.layer}: the encoder {options.encoder} has {layers} layers")


def _match(answer: _Text, reference: _Text) -> dict[str, float]:
    """Precision, recall and F1 of two texts, 0 where one of them is empty."""
    if not len(answer.vectors) or not len(reference.vectors):
        return dict.fromkeys(FIGURES.values(), 0.0)
    cosines = (answer.vectors @ reference.vectors.T).clamp(0, 1)  # (answer's tokens, reference's tokens)
    precision = float(answer.weights @ cosines.amax(1))
    recall = float(reference.weights @ cosines.amax(0))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _read(judge: _judges.Judge, text: str, layer: int | None, idf: Mapping[int, float] | None) -> _Text:
    import torch

    ids = judge.tokens(text.strip())
    own = _own(judge, ids[0].tolist())
    if not own:
        return _Text(torch.empty(0, 1), torch.empty(0))
    with torch.inference_mode():
        states = judge.module(ids, output_hidden_states=True).hidden_states[-1 if layer is None else layer][0]
    if not states.isfinite().all():
        raise GateInconclusive(f"the encoder's states of {text[:40]!r} are not finite")
    vectors = torch.nn.functional.normalize(states[own].double(), dim=1)
    counts = torch.ones(len(own), dtype=torch.float64)
    if idf is not None:
        weights = torch.tensor([idf[token] for token in ids[0, own].tolist()], dtype=torch.float64)
        counts = weights if weights.any() else counts  # a text of tokens that every reference has
    return _Text(vectors, counts / counts.sum())


def _own(judge: _judges.Judge, ids: Sequence[int]) -> list[int]:
    """Places of the tokens that stand for text."""
    special = {*judge.tokenizer.all_special_ids} - {judge.tokenizer.unk_token_id}
    return [place for place, token in enumerate(ids) if token not in special]


class _Frequencies(dict[int, float]):
    """Token → weight; one that no reference has weighs most."""

    def __init__(self, found: Counter[int], references: int) -> None:
        super().__init__({token: math.log((references + 1) / (count + 1)) for token, count in found.items()})
        self.most = math.log(references + 1)

    def __missing__(self, token: int) -> float:
        return self.most


@lru_cache(maxsize=2)
def _inverse_frequencies(judge: _judges.Judge, references: tuple[str, ...]) -> Mapping[int, float]:
    """−ln of the share of references that hold a token, with one added to both counts: section 3 of the paper."""
    found: Counter[int] = Counter()
    for reference in references:
        found.update(set(judge.tokens(reference.strip())[0].tolist()))
    return _Frequencies(found, len(references))
