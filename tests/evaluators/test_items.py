"""The items of the built-in tasks: minimal pairs from templates, and cloze from text."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from compress.errors import RecipeError
from compress.interfaces import Documents
from evaluators import _cloze, _minimal_pairs
from evaluators.accuracy import Accuracy


def test_minimal_pairs_are_many_repeat_themselves_and_differ_after_a_shared_word():
    clusters = list(_minimal_pairs.clusters())
    assert clusters == list(_minimal_pairs.clusters())
    assert list(_minimal_pairs.clusters(50, seed=1)) != clusters[:50]
    assert len(_minimal_pairs.PHENOMENA) >= 12
    groups = Counter(c.group for c in clusters)
    assert set(groups) == set(_minimal_pairs.PHENOMENA)
    assert min(groups.values()) > 4 * Accuracy.QUALIFYING
    assert len({c.items for c in clusters}) > 0.95 * len(clusters)
    for item in (i for c in clusters for i in c.items):
        right, wrong = item.choices
        assert item.prefix and right != wrong and right[0] == wrong[0] == " "
        assert right[-1] in ".?" and "  " not in item.prefix + right + wrong
    assert all(len(c.items) == 2 for c in clusters)


def test_both_items_of_a_phenomenon_come_first_equally_often():
    firsts = Counter(c.items[0].prefix.split()[1][-1] == "s" for c in _minimal_pairs.clusters() if "phrase" in c.group)
    assert min(firsts.values()) / sum(firsts.values()) > 0.4


def test_neither_length_nor_the_changed_words_alone_give_an_answer_away():
    rules = {
        "shorter": lambda right, wrong: len(right) < len(wrong),
        "longer": lambda right, wrong: len(right) > len(wrong),
        "fewer words": lambda right, wrong: len(right.split()) < len(wrong.split()),
        "first in the alphabet": lambda right, wrong: right < wrong,
    }
    for rule in rules.values():
        right, asked = Counter(), Counter()
        for cluster in _minimal_pairs.clusters(3000):
            right[cluster.group] += sum(rule(*item.choices) for item in cluster.items)
            asked[cluster.group] += 2
        assert all(right[group] / asked[group] < 0.6 for group in asked), {g: right[g] / asked[g] for g in asked}


def test_a_few_pairs_are_as_a_reader_expects_them():
    sentences = {i.prefix + c for n in _minimal_pairs.clusters() for i in n.items for c in i.choices[:1]}
    assert not [s for s in sentences if "boxs" in s or " a old" in s or " a officer" in s]


def prose(count, source="prose"):
    rng = random.Random(source)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(200)]
    sentence = lambda: " ".join(rng.choices(words, k=12)) + "."  # noqa: E731
    return Documents(source, [(f"d{i}", f"{sentence()} {sentence()}") for i in range(count)], "digest", 100)


def test_cloze_asks_for_the_true_word_among_words_about_as_frequent():
    data = prose(300)
    clusters = list(_cloze.clusters(data))
    assert clusters == list(_cloze.clusters(data)) and len(clusters) > 50
    texts = dict(data.documents)
    for cluster in clusters:
        (item,) = cluster.items
        right, *others = item.choices
        assert item.prefix + right + "." in texts[cluster.id]
        assert len(set(item.choices)) == _cloze.CHOICES
        used = texts[cluster.id].lower().replace(".", " ").split()
        assert not {o.strip() for o in others} & set(used)
        ends = {text.split(".")[k].split()[-1] for text in texts.values() for k in (0, 1)}
        assert {o.strip() for o in others} <= ends


def test_cloze_leaves_out_documents_without_a_fitting_sentence():
    texts = [
        "Too short a sentence.",
        "No full stop after this last word of a long enough sentence",
        "",
        "It was in U.S.",
    ]
    data = prose(60)
    odd = [(f"odd{i}", text) for i, text in enumerate(texts)]
    found = _cloze.clusters(replace(data, documents=[*odd, *data.documents]))
    assert not {c.id for c in found} & {name for name, _ in odd}
    assert list(_cloze.clusters(Documents("none", [], "d"))) == []


def test_pairs_are_looked_at_once_and_cloze_on_every_source():
    found = Accuracy(max_drop=3.0).sources([prose(60, "a"), prose(60, "b")])
    assert [d.source for d in found] == ["minimal_pairs", "cloze: a", "cloze: b"]
    assert len({d.digest for d in found}) == 3
    assert [d.digest for d in Accuracy(max_drop=3.0).sources([prose(60, "a")])] == [d.digest for d in found[:2]]
    assert [d.source for d in Accuracy(tasks=["minimal_pairs"], max_drop=3).sources([])] == ["minimal_pairs"]
    with pytest.raises(RecipeError, match="did you mean cloze"):
        Accuracy.model_construct(tasks=("clozes",)).sources([])
