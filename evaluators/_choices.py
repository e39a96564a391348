"""Items with several continuations of which one is right, and the model's log-probability of each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compress.errors import RecipeError
from compress.interfaces import Documents, LanguageModel

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A prefix and its possible continuations; the first one is right."""

    prefix: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Cluster:
    """Items that are not independent of each other. group: what they test."""

    id: str
    group: str
    items: tuple[Item, ...]


def as_documents(source: str, clusters: Sequence[Cluster], length: int) -> Documents:
    """One document per cluster, its id led by the group and its text holding the items as JSON."""
    pairs = [
        (f"{c.group}:{c.id}", json.dumps([[i.prefix, *i.choices] for i in c.items], ensure_ascii=False))
        for c in clusters
    ]
    return Documents(source, pairs, hashlib.sha256(json.dumps(pairs).encode()).hexdigest(), length)


def first(text: str) -> str:
    """A document's text with its first item alone."""
    return json.dumps(json.loads(text)[:1], ensure_ascii=False)


def group_of(document_id: str) -> str:
    """The group of a document, or of an item in it.

    >>> group_of("anaphor.gender:17/0")
    'anaphor.gender'
    """
    return document_id.split(":", 1)[0]


def sequences(text: str, encode: Callable[[str], list[int]], length: int) -> Iterator[tuple[Tokens, ...]]:
    """Tokens of every choice with its prefix, item by item; from the left, all but `length` tokens are cut.

    Raises RecipeError where the choices of an item have no first token in common: no row predicts that one.
    """
    for prefix, *choices in json.loads(text):
        # Together: where the prefix ends, a tokenizer may merge across.
        encoded = [tuple(encode(prefix + choice)) for choice in choices]
        excess = max(0, max(map(len, encoded)) - length)
        cut = tuple(tokens[excess:] for tokens in encoded)
        if not start_of(cut):
            raise RecipeError(f"the choices of {prefix + choices[0]!r} share no token; give them a longer prefix")
        yield cut


def start_of(tokens: Sequence[Tokens]) -> int:
    """Where scoring starts: at the first token that differs, yet so that each sequence has one to score.

    >>> start_of([(5, 6, 7), (5, 6, 8)]), start_of([(5, 6), (5, 6, 8)]), start_of([(5,), (6,)])
    (2, 1, 0)
    """
    shared = 0
    while all(len(t) > shared and t[shared] == tokens[0][shared] for t in tokens):
        shared += 1
    return min(shared, min(map(len, tokens)) - 1)


def log_probabilities(model: LanguageModel, items: Sequence[tuple[Tokens, ...]]) -> list[list[float]]:
    """Log-probability ln P(tokens from `start_of` on | tokens before it) of every choice of every item, in nats.

    Choices that differ in their last token alone share one window, which is one forward pass.
    """
    import torch

    from compress.numerics.divergence import token_nll

    cut = [_windows(item) for item in items]
    longest = max((len(window) for windows in cut for window in windows), default=0)
    if longest > model.context_length:
        raise RecipeError(f"items of {longest} tokens exceed the context of {model.context_length} ({model.runtime})")
    logits = model.logits([window for windows in cut for window in windows])
    found = []
    for item, windows in zip(items, cut, strict=True):
        start, scores = start_of(item), [math.nan] * len(item)
        for window in windows:
            rows = next(logits)
            first = len(window) - len(rows)  # above 0 of a classifier, which has a row for the whole window alone
            for i, tokens in enumerate(item):
                if window[: len(tokens) - 1] == tokens[:-1]:
                    nll = token_nll(rows[start - 1 - first : len(tokens) - 1 - first], torch.tensor(tokens[start:]))
                    scores[i] = -float(nll.sum())
        found.append(scores)
    return found


def _windows(item: Sequence[Tokens]) -> list[Tokens]:
    """Sequences without their last token, less those that begin another one."""
    needed = dict.fromkeys(tokens[:-1] for tokens in item)
    return [w for w in needed if not any(len(o) > len(w) and o[: len(w)] == w for o in needed)]
