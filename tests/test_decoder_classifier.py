"""Decoders with a classification head: facts, logits, a whole run to a checkpoint, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from compress import artifact, measure, plugin, recipe, run, source
from compress.architectures import Facts
from compress.classifier import Classifier
from compress.errors import RecipeError
from compress.families import CLASSIFYING_DECODERS
from compress.store import Store
from tests.tiny import byte_tokenizer
from tests.tiny_classifier import labelled, saved, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {0: "bad", 1: "good", 2: "mixed"}
PAD = 33  # a token that texts hold, too
TEXTS = ["the small proof", "a", "model weight scale", f"ends in {chr(PAD + 33)}"]
RECIPE = """
model: {model}
data:
  calibration: {{source: "file:{text}", tokens: 1024, length: 32}}
  selection: {{source: "file:{text}", tokens: 512, length: 32}}
  evaluation: [{{source: "file:{text}", length: 64}}]
release: [{{label_divergence: {{max_mean: 0.05}}}}]
steps: [{{{step}}}]
export: [{export}]
"""


def tiny(kind: str = "llama", **options: Any) -> Classifier:
    """Two random blocks over 256 byte tokens and three classes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 128}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD, "id2label": NAMES}
    config = AutoConfig.for_model(kind, **{**shape, **ends, "initializer_range": 0.2, **options})
    module = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return Classifier(module.eval(), byte_tokenizer(), name=f"tiny-{kind}")


def rows(model: Any) -> torch.Tensor:
    return torch.cat([row.clone() for row in model.logits([model.encode(text) for text in TEXTS])])


@pytest.mark.parametrize("kind", CLASSIFYING_DECODERS)
def test_tables_and_logits_are_those_of_transformers_and_survive_saving(kind: str, tmp_path: Path) -> None:
    model = source.load(str(saved(tiny(kind), tmp_path / "model")))
    shapes = {name: tuple(p.shape) for name, p in model.module.named_parameters() if p.dim() == 2}
    assert isinstance(model, Classifier) and model.facts.matrices == shapes
    assert model.labels == ("bad", "good", "mixed") and shapes["score.weight"] == (3, 64)
    with torch.no_grad():
        inputs = [torch.tensor([model.encode(text)]) for text in TEXTS]
        alone = torch.cat([model.module(input_ids=ids).logits for ids in inputs])
    torch.testing.assert_close(rows(model), alone, atol=1e-5, rtol=0)  # padding is not seen
    artifact.save(model, tmp_path / "artifact")
    back = artifact.load(tmp_path / "artifact")
    assert isinstance(back, Classifier) and back.digest == model.digest and torch.equal(rows(back), rows(model))


def load(place: Path, step: str, export: str) -> recipe.Recipe:
    return recipe.load(RECIPE.format(model=place / "model", text=place / "text.jsonl", step=step, export=export))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    saved(tiny(), folder / "model")
    write_rows(folder / "text.jsonl", labelled(400))
    return folder


def test_a_run_ships_a_checkpoint_that_tells_the_same_classes(place: Path, tmp_path: Path) -> None:
    step = "quantize.gptq: {encoding: int8, group_size: 32, embeddings: fp16}, gate: off"
    store = Store(tmp_path / "home")
    record, folder = run.apply(load(place, step, "checkpoint: {}"), tmp_path / "run", store)
    assert record.status == "passed", record
    (export,) = record.exports
    assert export.weights_exact and {c.metric for c in export.gate.checks} == {
        "label_divergence",
        "parity",
        "parity_max",
    }
    final = store.find(record.steps[0].digest)
    assert final is not None
    opened = measure.open_model(str(folder / str(export.path)))
    assert opened.labels == ("bad", "good", "mixed")  # type: ignore[attr-defined]
    torch.testing.assert_close(rows(opened), rows(artifact.load(final)), atol=1e-5, rtol=0)
    card = (folder / str(export.path) / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "AutoModelForCausalLM" not in card
    assert "text-classification" in card


@pytest.mark.parametrize(
    ("exporter", "fields", "message"),
    [
        ("gguf", {}, "gguf holds language models, and llama here tells classes apart; export to checkpoint"),
        ("onnx", {}, "onnx has no graph of a llama that tells classes apart"),
        ("onnx", {"flavour": "portable"}, "onnx has no graph of a llama that tells classes apart"),
        ("checkpoint", {"format": "gptq"}, "gptq is for language models, and llama here tells classes apart"),
    ],
)
def test_formats_of_language_models_refuse_it(exporter: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plugin.exporter(exporter)(**fields).check(tiny().facts)


def test_without_a_padding_token_no_last_token_is_known() -> None:
    config = {**tiny().module.config.to_dict(), "architectures": ["LlamaForSequenceClassification"]}
    assert Facts.from_config(config).labels == ("bad", "good", "mixed")
    with pytest.raises(RecipeError, match="last token by pad_token_id, which is null; set it"):
        Facts.from_config({**config, "pad_token_id": None})
