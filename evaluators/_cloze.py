"""Cloze: the true word that ends a sentence of a held-out document, among words about as frequent."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

from compress.interfaces import Documents
from evaluators._choices import Cluster, Item

CHOICES = 32  # SmolLM2-135M is right on 99 % with 4 (80 items of wiki), where little harm would show; 94 % with 32
_PREFIX_WORDS = (8, 60)  # fewer say too little; more cost time
_COMMON = 2000  # sentence-ending words that take part: the rest are several tokens, and cost a window each
_NEIGHBOURS = 100  # ranks around the true word from which distractors are drawn
_WORD = re.compile(r"[a-z]+")
# A word of letters in lower case, ended by a full stop that ends the sentence: no names, numbers, abbreviations.
_LAST_WORD = re.compile(r"(?<= )[a-z]{3,}(?=\.(?:\s|$))")


def clusters(data: Documents) -> Iterator[Cluster]:
    """One item per document that has a fitting sentence, in the documents' order.

    Distractors end sentences of the same source too, and are drawn among those next in frequency; the draw
    depends on the source and on the document's id alone.
    """
    words = Counter(word for _, text in data.documents for word in _WORD.findall(text))
    ends = [(name, text, _endings(text)) for name, text in data.documents]
    ending = {word for _, _, found in ends for _, word in found}
    ranked = sorted(ending, key=lambda word: (-words[word], word))[:_COMMON]
    rank = {word: i for i, word in enumerate(ranked)}
    for name, text, found in ends:
        fitting = [(s, w) for s, w in found if w in rank and len(text[:s].split()) >= _PREFIX_WORDS[0]]
        if not fitting:
            continue
        start, word = fitting[0]
        near = _near(ranked, rank[word], set(_WORD.findall(text.lower())))
        if len(near) >= CHOICES - 1:
            others = random.Random(f"cloze {data.source} {name}").sample(near, CHOICES - 1)
            prefix = " ".join(text[:start].split()[-_PREFIX_WORDS[1] :])
            yield Cluster(name, "cloze", (Item(prefix, tuple(f" {w}" for w in (word, *others))),))


def _endings(text: str) -> list[tuple[int, str]]:
    return [(match.start(), match.group()) for match in _LAST_WORD.finditer(text)]


def _near(ranked: list[str], rank: int, used: set[str]) -> list[str]:
    """Words ranked around `rank`, without itself and without those that the document uses."""
    around = ranked[max(0, rank - _NEIGHBOURS) : rank + _NEIGHBOURS + 1]
    return [word for word in around if word != ranked[rank] and word not in used]
