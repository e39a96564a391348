"""Anything at all in place of a recipe, or of a value in one: read, or refused in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, RecipeError
from compress.recipe import Recipe, load
from tests.test_recipe import TEXT


@given(st.text(max_size=200))
def test_any_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(CompressError) as caught:
        load(text)
    assert isinstance(caught.value, RecipeError)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load(path)


YAML_ISH = st.text(st.sampled_from(list("aoff:-[]{}&*!|>'\"%@`#,? \n\t\\x0u1.eE~<=")), max_size=60)


@given(position=st.integers(0, len(TEXT)), removed=st.integers(0, 8), inserted=YAML_ISH)
def test_a_damaged_recipe_is_read_or_refused(position: int, removed: int, inserted: str) -> None:
    damaged = TEXT[:position] + inserted + TEXT[position + removed :]
    try:
        assert isinstance(load(damaged), Recipe)
    except RecipeError as error:
        assert "\n" not in str(error)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 100) | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
PATHS = [
    "model", "device", "dtype", "seed", "data", "data.calibration", "data.evaluation",
    "data.calibration.tokens",
    "release", "release.0", "release.0.max_increase", "release.0.confidence", "gate", "steps", "steps.0",
    "steps.0.gate", "steps.0.encoding", "steps.0.group_size", "steps.0.keep", "steps.0.otherwise",
    "steps.0.otherwise.1", "export", "export.0",
]  # fmt: skip


@given(path=st.sampled_from(PATHS), value=json_like)
def test_any_value_anywhere_is_read_or_refused(path: str, value: object) -> None:
    import json

    try:
        assert isinstance(load(TEXT, [f"{path}={json.dumps(value)}"]), Recipe)
    except RecipeError as error:
        assert "\n" not in str(error)
