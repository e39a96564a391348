"""Encoders with a classification head: facts, loading, saving, steps, and what is refused before weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import artifact, measure, plugin, recipe, refusals, source
from compress.architectures import Facts
from compress.blocks import walk
from compress.classifier import Classifier, model_of
from compress.encodings import EncodedTensor
from compress.errors import Corrupt, RecipeError, UnsafeInput
from compress.families import ENCODERS
from compress.interfaces import Context
from compress.model import Model
from tests.tiny import tiny_model
from tests.tiny_classifier import KINDS, labelled, learned, saved, tiny_classifier, tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the small proof", "a loss", "model weight scale token group loss margin proof of and in to", "zebra"]
STEPS = {
    "quantize.rtn": {"group_size": 16, "embeddings": "int4"},
    "quantize.cast": {},
    "quantize.hqq": {"group_size": 16},
    "quantize.gptq": {"group_size": 16},
    "prune.magnitude": {"sparsity": 0.3},
    "prune.wanda": {"sparsity": 0.3, "allocation": "owl"},
    "prune.sparsegpt": {"sparsity": 0.3},
}


def windows(model: Model, length: int = 24) -> list[torch.Tensor]:
    stream = torch.tensor([t for row in labelled(200, seed=2) for t in model.encode(row["text"])])
    return list(stream[: len(stream) // length * length].view(-1, length))


def rows(model: Any) -> torch.Tensor:
    return torch.cat([row.clone() for row in model.logits([model.encode(text) for text in TEXTS])])


def expected(model: Classifier) -> torch.Tensor:
    """The logits of transformers alone, each text by itself."""
    with torch.no_grad():
        inputs = [model.tokenizer(text, return_tensors="pt") for text in TEXTS]
        return torch.cat([model.module(**some).logits for some in inputs])


# --- facts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_every_matrix_and_every_linear_of_the_blocks(kind: str) -> None:
    model = tiny_classifier(kind)
    facts, module = model.facts, model.module
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.dim() == 2}
    assert facts.matrices == shapes
    assert facts.parameters + facts.floats == sum(p.numel() for p in module.parameters())
    inside = {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(facts.linears) == {n for n in inside if n.startswith(f"{facts.architecture.blocks}.")}
    norms = {n for n, m in module.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    stated = {f"{facts.architecture.blocks}.{i}.{n}" for i in range(2) for n in facts.architecture.block_norms}
    assert norms == {*stated, facts.architecture.final_norm}
    assert (facts.labels, facts.context_length, facts.head_size) == (("bad", "good", "mixed"), 48, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "supported with a head for classes .* not as BertForMaskedLM"),
        ({"architectures": None}, "not as no head"),
        ({"model_type": "gemma"}, "a classifier of architecture 'gemma' is not supported; supported: bert, roberta"),
        ({"id2label": {"0": "score"}}, "one of several classes is supported, and this one has 1 outputs"),
        ({"problem_type": "multi_label_classification"}, "3 outputs for multi_label_classification"),
        ({"is_decoder": True}, "only encoders with absolute positions"),
        ({"position_embedding_type": "relative_key"}, "only encoders with absolute positions"),
        ({"model_type": "roberta", "pad_token_id": None}, "counts positions from pad_token_id on, which is null"),
    ],
)
def test_other_heads_and_encoders_are_refused_from_the_config(change: dict[str, Any], message: str) -> None:
    config = {**tiny_classifier().module.config.to_dict(), "architectures": ["BertForSequenceClassification"]}
    assert Facts.from_config(config).labels == ("bad", "good", "mixed")
    with pytest.raises(RecipeError, match=message):
        Facts.from_config({**config, **change})
    assert Facts.from_config({**config, "id2label": None}).labels == ("LABEL_0", "LABEL_1")  # transformers' default


# --- opening ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_opens_computes_what_transformers_does_and_survives_saving(kind: str, tmp_path: Path) -> None:
    model = source.load(str(saved(tiny_classifier(kind), tmp_path / "model")))
    assert isinstance(model, Classifier) and model.labels == ("bad", "good", "mixed")
    torch.testing.assert_close(rows(model), expected(model), atol=1e-5, rtol=0)  # padding is not seen
    artifact.save(model, tmp_path / "artifact")
    artifact.verify(tmp_path / "artifact")
    back = artifact.load(tmp_path / "artifact")
    assert isinstance(back, Classifier) and back.digest == model.digest
    assert torch.equal(rows(back), rows(model))
    assert back.encode("the small proof") == [2, *model.tokenizer.convert_tokens_to_ids("the small proof".split()), 3]


def test_a_package_may_hold_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_classifier(), tmp_path / "tiny_package" / "model")
    info = tmp_path / "tiny_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{p.relative_to(tmp_path)},,\n" for p in folder.iterdir()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source.resolve("pkg:tiny-package").path == folder
    assert isinstance(source.load("pkg:tiny-package"), Classifier)


def test_a_long_text_keeps_what_closes_it() -> None:
    model = tiny_classifier()
    ids = model.encode("loss " * 60)
    assert len(ids) == 48 and ids[0] == 2 and ids[-1] == 3
    assert next(model.logits([ids])).shape == (1, 3)


def test_what_cannot_be_trusted_is_refused_as_for_decoders(tmp_path: Path) -> None:
    folder = saved(tiny_classifier(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UnsafeInput, match="auto_map asks for remote code"):
        source.load(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(Corrupt, match="tensor bert.encoder.layer.2.* is missing"):
        source.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match="could execute code"):
        source.load(str(folder))


def test_it_writes_nothing_token_by_token() -> None:
    model = tiny_classifier()
    for method in ("generate", "decode_logits", "stream", "branch_logits"):
        with pytest.raises(RecipeError, match="tells 3 classes apart: it writes no text"):
            getattr(model, method)([2, 3])
    assert model.eos_ids == frozenset() and tiny_model().labels == ()
    assert type(model_of(tiny_model().module, tokenizer())) is Model


# --- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_feeds_every_block_what_transformers_does(kind: str) -> None:
    model = tiny_classifier(kind)
    some = windows(model)[:5]
    with torch.no_grad():
        states = model.module.base_model(torch.stack(some), output_hidden_states=True).hidden_states
    blocks = list(walk(model, some))
    assert [block.index for block in blocks] == [0, 1]
    for block, wanted in zip(blocks, states[1:], strict=True):
        found = torch.cat(block.advance())
        assert (found - wanted).norm() < 0.03 * wanted.norm()  # products in bfloat16, of large random weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEPS)
def test_steps_that_take_classifiers_change_every_block_and_survive_saving(
    kind: str, name: str, tmp_path: Path
) -> None:
    model = tiny_classifier(kind)
    step = plugin.step(name)(**STEPS[name])
    step.check(model.facts)
    step.apply(model, Context(seed=0, calibration=windows(model)))
    model.touch()
    if name.startswith("prune"):
        assert model.masks.keys() == {f"{linear}.weight" for linear in model.facts.linears}
    else:
        assert model.encoded.keys() == model.facts.matrices.keys()
        assert all(isinstance(model.tensor(name), EncodedTensor) for name in model.facts.matrices)
    artifact.save(model, tmp_path / "artifact")
    assert torch.equal(rows(artifact.load(tmp_path / "artifact")), rows(model))


def test_gptq_keeps_outputs_that_rounding_loses() -> None:
    known, losses = learned(), {}
    texts = [known.encode(row["text"]) for row in labelled(200, seed=4)]
    wanted = torch.cat(list(known.logits(texts)))
    for name in ("quantize.rtn", "quantize.gptq"):
        model = learned()
        step = plugin.step(name)(encoding="int3", group_size=32, embeddings=None)
        step.apply(model, Context(seed=0, calibration=windows(model)))
        losses[name] = float((torch.cat(list(model.logits(texts))) - wanted).square().mean())
    assert losses["quantize.gptq"] < 0.8 * losses["quantize.rtn"]


# --- refusals --------------------------------------------------------------------------------------------

RECIPE = """
model: {model}
data:
  calibration: {{source: "file:{text}", tokens: 1024, length: 24}}
  selection: {{source: "file:{text}", tokens: 512, length: 24}}
  evaluation: [{{source: "file:{text}", length: 48}}]
release: [{release}]
steps: [{{{step}, gate: off}}]
export: {export}
"""
CHECK = "classification: {{data: 'file:{text}', max_drop: 5.0}}"
RTN = "quantize.rtn: {encoding: int8, group_size: 16}"


def plan(place: Path, release: str = CHECK, step: str = RTN, export: str = "[]", *overrides: str) -> recipe.Recipe:
    text = write_rows(place / "rows.jsonl", labelled(400))
    checks = "{" + release.format(text=text) + "}"
    return recipe.load(RECIPE.format(model=place, text=text, release=checks, step=step, export=export), overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"release": "perplexity: {{max_increase: 5%}}"}, "release: perplexity: is for models of text, and this one"),
        ({"release": "divergence: {{max_mean: 0.1}}"}, "release: divergence: is for models of text"),
        ({"release": CHECK[:-2] + ", template: '{{text}}?'}}"}, "reads the text alone; leave it out"),
        ({"release": CHECK[:-2] + ", labels: {{a: bad, b: nice}}}}"}, "'nice' is no class of the model; it has bad"),
        ({"release": CHECK[:-2] + ", labels: {{a: bad, b: good}}}}"}, "expected each class of the model once"),
        ({"step": "prune.neurons: {fraction: 0.4}"}, "neurons: fraction=0.4 of 64 channels removes none"),
        (
            {"step": "prune.heads: {groups: 1}"},
            "heads: the config of a bert cannot say .* use prune.neurons or prune.la",
        ),
        ({"step": "prune.hidden: {fraction: 0.5}"}, "hidden: fraction=0.5 of 32 channels removes none"),
        ({"step": "quantize.awq: {group_size: 16}"}, "awq: takes language models, and bert here tells classes"),
        ({"step": "quantize.awq: {group_size: 16}"}, "prune.magnitude, prune.neurons, prune.sparsegpt, prune.wanda, q"),
        ({"step": "distill.logits: {tokens: 64}"}, "distill.logits: takes language models"),
        ({"step": "prune.wanda: {sparsity: 0.2, allocation: sensitivity}"}, "this model has none; use owl or uniform"),
        ({"export": "[gguf: {}]"}, "gguf cannot write architecture 'bert'"),
        ({"export": "[checkpoint: {}]"}, "tells classes apart; export to onnx"),
    ],
)
def test_what_does_not_work_is_refused_before_weights_load(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    facts = tiny_classifier().facts
    refusals.check(plan(tmp_path, release="label_divergence: {{max_mean: 0.1}}"), facts)
    refusals.check(plan(tmp_path, step="prune.hidden: {fraction: 0.5, round_to: 16}"), facts)
    with pytest.raises(RecipeError, match=message) as error:
        refusals.check(plan(tmp_path, **changes), facts)
    assert "\n" not in str(error.value) and "recipe.yaml:" in str(error.value)


def test_streaming_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="streaming: is for language models, and bert here tells classes apart"):
        refusals.check(plan(tmp_path, CHECK, RTN, "[]", "streaming=true"), tiny_classifier().facts)
    with pytest.raises(RecipeError, match="streaming is for language models"):
        source.load(str(saved(tiny_classifier(), tmp_path / "model")), streaming=True)


def test_checks_of_classes_are_refused_for_a_model_of_text(tmp_path: Path) -> None:
    facts = tiny_model().facts
    with pytest.raises(RecipeError, match="labels are missing: the words for each class"):
        refusals.check(plan(tmp_path), facts)
    with pytest.raises(RecipeError, match="label_divergence: compares the classes .* use divergence"):
        refusals.check(plan(tmp_path, release="label_divergence: {{max_mean: 0.1}}"), facts)


def test_eval_measures_classes_and_refuses_the_rest(tmp_path: Path) -> None:
    folder, text = saved(learned(), tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", labelled(120))
    names = [f"classification:file:{text}", "label_divergence"]
    found = measure.evaluate(str(folder), names, against=str(folder), source=f"file:{text}")
    accuracy, divergence = found["metrics"]
    assert accuracy["value"] > 0.95 and accuracy["examples"] == 120 and accuracy["against"]["loss"] == 0
    assert divergence["value"] == 0 and divergence["unit"] == "nats per text"
    with pytest.raises(RecipeError, match="perplexity: is for models of text"):
        measure.evaluate(str(folder), ["perplexity"], source=f"file:{text}")
    assert set(ENCODERS) == set(KINDS)
