"""The store gives back what was put under a key, and nothing that has only found its way there."""

import logging
import shutil

import pytest

from compress import artifact
from compress.errors import Corrupt
from compress.store import Store
from tests.tiny import tiny_model


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def record_of(store, key):
    return store.root / "records" / key[:2] / f"{key}.json"


def test_a_record_is_read_back_under_its_own_key_alone(store, caplog):
    store.put("aa-perplexity of one model", [1.5, None, "x"])
    store.put("bb-perplexity of another", [0.5])
    assert store.get("aa-perplexity of one model") == [1.5, None, "x"] and store.get("cc-absent") is None
    shutil.copy(record_of(store, "aa-perplexity of one model"), record_of(store, "bb-perplexity of another"))
    with pytest.raises(Corrupt, match="not what was stored"):
        store.read("bb-perplexity of another")
    with caplog.at_level(logging.WARNING):
        assert store.get("bb-perplexity of another") is None
    assert "set aside and computed anew" in caplog.text
    assert not record_of(store, "bb-perplexity of another").exists()
    assert store.get("aa-perplexity of one model") == [1.5, None, "x"]


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"value": 2}', '{"sha256": "0", "value": 2}'])
def test_a_damaged_record_is_none(store, text):
    store.put("aa", 1)
    record_of(store, "aa").write_text(text)
    with pytest.raises(Corrupt):
        store.read("aa")
    assert store.get("aa") is None and store.read("aa") is None  # it was set aside


def test_an_artifact_is_known_by_what_was_made_under_its_key(store):
    for key, seed in (("a", 0), ("b", 1)):
        store.save(tiny_model(seed), key)
        assert store.made(key) is None  # until it is on record how
        store.remember(key, {"seconds": seed})
        folder, facts = store.made(key)
        assert folder == store.artifact_path(key) and facts["seconds"] == seed
    digests = [artifact.digest(store.artifact_path(key)) for key in "ab"]
    a, b, aside = store.artifact_path("a"), store.artifact_path("b"), store.root / "aside"
    a.rename(aside), b.rename(a), aside.rename(b)  # whole artifacts, each under the other's key
    assert store.artifact("a") == a and artifact.digest(a) == digests[1]
    assert store.made("a") is None and store.made("b") is None and not a.exists() and not b.exists()
    store.save(tiny_model(0), "a")
    assert store.made("a")[0] == a and artifact.digest(a) == digests[0]
