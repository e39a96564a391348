"""Manifests that vouch for themselves."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import sealing
from compress.errors import Corrupt

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé漢\n"\\'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", max_size=3), JSON, max_size=4))
def test_what_is_sealed_is_read_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("sealed")
    sealing.write(folder, value)
    assert sealing.read(folder) == value


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", '{"schema": "s"}', '{"sha256": 1}', '{"a": NaN, "sha256": "x"}', "[" * 100_000, '"\\ud800"'],
)
def test_what_was_never_sealed_is_corrupt(tmp_path, text):
    (tmp_path / sealing.FILE).write_text(text)
    with pytest.raises(Corrupt, match=sealing.FILE):
        sealing.read(tmp_path)


def test_another_layout_of_the_same_values_is_seen(tmp_path):
    sealing.write(tmp_path, {"b": 1, "a": [1.5, "é"]})
    value = json.loads((tmp_path / sealing.FILE).read_text())
    for other in (json.dumps(value), json.dumps({**value, "b": 2}, indent=1, sort_keys=True) + "\n"):
        (tmp_path / sealing.FILE).write_text(other)
        with pytest.raises(Corrupt, match="do not match the sha256 that it states of itself"):
            sealing.read(tmp_path)


def test_a_missing_manifest_is_corrupt(tmp_path):
    with pytest.raises(Corrupt, match="no readable"):
        sealing.read(tmp_path)
