"""What every plug-in promises: one test over all of them."""

import importlib

import pytest
import torch

from compress import artifact, plugin
from compress.interfaces import Context
from tests.tiny import tiny_model

# The smallest valid fields of plug-ins whose fields are not all optional, at the size of the tiny model.
FIELDS = {
    "distill.logits": {"tokens": 128, "selection_tokens": 64, "batch": 1, "checks": 1},
    "distill.hidden": {"tokens": 128, "selection_tokens": 64, "batch": 1, "checks": 1},
    "distill.on_policy": {
        "tokens": 128,
        "selection_tokens": 64,
        "batch": 1,
        "checks": 1,
        "prompt_tokens": 8,
        "new_tokens": 24,
        "student_share": 1.0,
    },
    "distill.sequence": {
        "tokens": 128,
        "selection_tokens": 64,
        "batch": 1,
        "checks": 1,
        "prompt_tokens": 8,
        "new_tokens": 24,
    },
    "distill.qat": {"tokens": 512, "selection_tokens": 64, "batch": 1, "checks": 1},
    "prune.heads": {"groups": 1},
    "prune.hidden": {"fraction": 0.5, "round_to": 16},
    "prune.layers": {"count": 1},
    "prune.magnitude": {"sparsity": 0.3},
    "prune.neurons": {"fraction": 0.5},
    "prune.sparsegpt": {"sparsity": 0.3},
    "prune.wanda": {"sparsity": 0.3},
    "quantize.rtn": {"group_size": 16},
    "quantize.gptq": {"group_size": 16},
    "quantize.awq": {"group_size": 16},
    "quantize.ggml": {"type": "q4_1"},
    "quantize.hqq": {"group_size": 16},
    "quantize.mixed": {"group_size": 16, "target_bits": 5.5, "sensitivity_tokens": 64},
    "quantize.scales": {"tokens": 512, "selection_tokens": 64, "batch": 1, "checks": 1},
    "accuracy": {"max_drop": 3.0},
    "bits_per_byte": {"max_increase": 0.02},
    "perplexity": {"max_increase": "5%"},
    "pronouns": {"max_rise": 3.0},
    "refusals": {"data": "file:prompts.jsonl", "max_rise": 3.0},
    "toxicity": {"data": "file:prompts.jsonl", "scorer": {"words": "file:words.txt"}, "max_rise": 3.0},
    "robustness": {"max_drop": 5.0},
    "stereotypes": {"max_rise": 3.0},
    "classification": {"data": "file:texts.jsonl", "labels": {"0": " bad", "1": " good"}, "max_drop": 3.0},
    "code": {"data": "file:problems.jsonl", "max_drop": 3.0},
    "text": {"data": "file:qa.jsonl", "metric": "f1", "max_drop": 3.0},
    "divergence": {"max_mean": 0.1},
    "label_divergence": {"max_mean": 0.1},
    "footprint": {"max_mb": 80},
    "size": {"max_mb": 80},
    "latency": {"max_ratio": 0.6},
    "generation": {"max_collapsed": "10%"},
    "long_context": {"max_increase": "15%"},
}
# Where the tiny model is too small: fields of its config.
MODELS = {"quantize.kv_cache": {"head_dim": 32}}
ALL = [(kind, name) for kind in ("step", "evaluator", "exporter") for name in plugin.names(kind)]


def make(kind: str, name: str):
    return getattr(plugin, kind)(name)(**FIELDS.get(name, {}))


def windows(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (32,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind,name", ALL)
def test_name_is_the_file_and_fields_survive_yaml(kind, name):
    made = make(kind, name)
    module = importlib.import_module(type(made).__module__)
    assert type(made).__module__.endswith(name) and name.split(".")[-1] == module.__file__.split("/")[-1][:-3]
    assert type(made).model_validate(made.model_dump(mode="json")) == made
    assert type(made).__doc__ and isinstance(type(made).version, int)
    with pytest.raises(ValueError, match="frozen"):
        made.name_of_no_field = 1
    with pytest.raises(ValueError, match="no_such_field"):
        type(made)(**FIELDS.get(name, {}), no_such_field=1)


@pytest.mark.parametrize("name", plugin.names("step"))
def test_a_step_repeats_itself_and_what_it_makes_survives_saving(name, tmp_path):
    digests = []
    for i in range(2):
        model = tiny_model(**MODELS.get(name, {}))
        context = Context(seed=0, calibration=windows(8, 0), selection=windows(4, 1), teacher=tiny_model)
        if plugin.step(name).refines:
            plugin.step("quantize.rtn")(encoding="int3", group_size=16).apply(model, context)
        before = model.digest
        make("step", name).apply(model, context)
        model.touch()
        digests.append(artifact.save(model, tmp_path / str(i)))
        if not name.startswith("distill."):  # its own teacher has nothing to teach this student
            assert model.digest != before
    assert digests[0] == digests[1]
    back = artifact.load(tmp_path / "0")
    window = [[1, 2, 3, 250]]
    assert torch.equal(next(back.logits(window)), next(model.logits(window)))


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(Exception, match=r"unknown step 'quantize.gtpq'; did you mean quantize.gptq"):
        plugin.step("quantize.gtpq")
    with pytest.raises(Exception, match=r"did you mean quantize.rtn"):
        plugin.step("rtn")
