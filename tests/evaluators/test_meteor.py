"""METEOR with synonyms, from a small WordNet in the format of the real one."""

import json

import nltk.data
import pytest
from nltk.corpus import WordNetCorpusReader
from nltk.translate.meteor_score import meteor_score

from compress.errors import Corrupt, RecipeError
from compress.interfaces import Example
from evaluators import _text_metrics, _wordnet
from evaluators.text import Text

SYNONYMS = {
    "noun": [("car", "auto"), ("child", "kid")],
    "verb": [("buy", "get"), ("purchase", "obtain")],
    "adj": [("big", "great")],
}


def wordnet(folder):
    """Sets of synonyms as files: data by byte offset, indexes of words, and one irregular form."""
    folder.mkdir()
    (folder / "lexnames").write_text("00\tall\t1\n")
    for part in ("noun", "verb", "adj", "adv"):
        data, index = "  1 a comment, as the licence of the real files is\n", []
        for words in SYNONYMS.get(part, []):
            at, frames = len(data), " 00" if part == "verb" else ""
            lemmas = " ".join(f"{word} 0" for word in words)
            data += f"{at:08d} 00 {part[0]} {len(words):02x} {lemmas} 000{frames} | a gloss  \n"
            index += [f"{word} {part[0]} 1 0 1 0 {at:08d}  \n" for word in words]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text("".join(sorted(index)))
        (folder / f"{part}.exc").write_text({"verb": "bought buy\n", "noun": "children child\n"}.get(part, ""))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wordnet(tmp_path_factory.mktemp("wordnet") / "dict")


@pytest.mark.parametrize(
    ("answer", "reference", "want"),
    [
        ("get it", "buy it", 1 - 0.5 * (1 / 2) ** 3),  # two matches in one chunk
        ("bought it", "get it", 1 - 0.5 * (1 / 2) ** 3),  # by its base form
        ("great cars", "Big auto", 1 - 0.5 * (1 / 2) ** 3),
        ("a kid", "a child", 1 - 0.5 * (1 / 2) ** 3),
        ("an auto", "a child", 0.0),
        ("purchase it", "obtain it", 0.5 * (1 - 0.5)),  # nltk looks stems up, and "purchas" is no word
    ],
)
def test_synonyms_match(folder, answer, reference, want):
    found = _text_metrics.scorer("meteor", wordnet=folder)(answer, [reference])
    assert found == pytest.approx(want, abs=1e-12)
    assert found >= _text_metrics.scorer("meteor_stem")(answer, [reference])


def test_the_best_reference_counts_and_values_are_nltks(folder, monkeypatch):
    monkeypatch.setattr(WordNetCorpusReader, "map_wn", lambda self, version="": None)  # it takes a second WordNet
    monkeypatch.setattr(nltk.data, "path", [folder])  # outside of which it refuses to read
    with pytest.warns(UserWarning, match="multilingual"):
        plain = WordNetCorpusReader(folder, None)
    answer, references = "the kid bought a great car .", ["a child gets cars .", "the kid has a big auto ."]
    want = meteor_score([r.split() for r in references], answer.split(), wordnet=plain)
    assert _text_metrics.scorer("meteor", wordnet=folder)(answer, references) == want > 0.5
    for file in plain._data_file_map.values():
        file.close()


def check(folder, tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text(json.dumps({"prompt": "q", "reference": "buy it"}) + "\n")
    return Text(data=f"file:{data}", metric="meteor", wordnet=folder, max_drop=3.0)


def test_a_check_scores_with_it_and_its_files_are_in_every_key(tmp_path):
    found = check(wordnet(tmp_path / "wn"), tmp_path)
    found.check()
    measure = found._measure()
    assert measure("get it", ["buy it"])[0] == pytest.approx(0.9375)
    (data,) = found.sources([])
    (example,) = found.examples(data, lambda text: [ord(c) for c in text])
    assert example == Example("1", "1", (tuple(map(ord, "q")), ("buy it",)))
    before = found.reads()
    (tmp_path / "wn" / "verb.exc").write_text("")
    assert found.reads() != before and found.sources([])[0].digest != data.digest
    assert found._measure()("bought it", ["get it"])[0] < 0.9375


@pytest.mark.parametrize("name", ["lexnames", "data.verb", "index.adj", "noun.exc"])
def test_a_folder_without_its_files_is_refused_before_weights_load(tmp_path, name):
    folder = wordnet(tmp_path / "wn")
    (tmp_path / "wn" / name).unlink()
    with pytest.raises(RecipeError, match=rf"no file {name} there; .* nltk\.download"):
        check(folder, tmp_path).check()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("index.noun", "car n one 0 1 0 00000000\n", "invalid literal"),
        ("lexnames", "05\tall\t1\n", "AssertionError"),
        ("data.verb", "  moved by a line\n", "no synset of 'buy'"),
    ],
)
def test_a_damaged_file_is_said(tmp_path, name, text, problem):
    folder = wordnet(tmp_path / "wn")
    (tmp_path / "wn" / name).write_text(text)
    with pytest.raises(Corrupt, match=f"not readable as WordNet .*{problem}"):
        _wordnet.opened(folder).synsets("buy")
