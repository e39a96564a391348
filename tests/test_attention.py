"""Our attention inside transformers models: where it is used, and that nothing but the speed shows it."""

import json

import torch

from compress import artifact, attention
from compress.model import Model
from tests.tiny import tiny_model


def counted(monkeypatch):
    """The shapes of the queries that our own attention is asked for."""
    asked = []
    own = attention.causal_attention

    def counting(query, key, value, scale):
        asked.append(tuple(query.shape))
        return own(query, key, value, scale)

    monkeypatch.setattr(attention, "causal_attention", counting)
    return asked


def test_logits_are_those_of_torch_attention(monkeypatch):
    model = tiny_model()
    windows = [[(7 * i + j) % model.vocabulary_size for i in range(100 + j)] for j in range(3)]
    asked = counted(monkeypatch)
    found = {}
    for implementation in (attention.CAUSAL, "sdpa"):
        model.module.config._attn_implementation = implementation
        for model.dtype in ("float32", "bfloat16"):
            found[implementation, model.dtype] = torch.cat(list(model.logits(windows)))
    assert len(asked) == 2 * model.facts.layers  # the three windows in one batch, in both types
    exact = found["sdpa", "float32"]
    torch.testing.assert_close(found[attention.CAUSAL, "float32"], exact, rtol=1e-4, atol=1e-4)
    ours, theirs = (float((found[i, "bfloat16"] - exact).norm()) for i in (attention.CAUSAL, "sdpa"))
    assert ours < 1.1 * theirs  # no coarser than the kernel that it replaces


def test_short_texts_and_steps_of_decoding_are_left_to_torch(monkeypatch):
    model = tiny_model()
    asked = counted(monkeypatch)
    window = list(range(attention.SHORTEST - 1))
    list(model.logits([window]))
    assert not asked
    list(model.stream([*window, 1, 2, 3], prefill=attention.SHORTEST))
    assert {shape[2] for shape in asked} == {attention.SHORTEST}  # the prefill, and no step after it


def test_a_mask_is_left_to_torch(monkeypatch):
    model = tiny_model()
    asked = counted(monkeypatch)
    ids = torch.arange(100)[None]
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    mask[..., 50:, :20] = False
    with torch.inference_mode():
        masked = model.module(input_ids=ids, attention_mask=mask).logits
        plain = model.module(input_ids=ids).logits
    assert len(asked) == model.facts.layers  # by the second call
    assert not torch.allclose(masked[:, 60:], plain[:, 60:])


def test_an_attention_that_was_chosen_is_kept():
    module = tiny_model().module
    module.config._attn_implementation = "eager"
    assert Model(module, None).module.config._attn_implementation == "eager"


def test_a_saved_model_does_not_speak_of_it(tmp_path):
    model = tiny_model()
    artifact.save(model, tmp_path / "saved")
    for file in (tmp_path / "saved").rglob("*.json"):
        assert attention.CAUSAL not in file.read_text(), file
    assert attention.CAUSAL not in json.dumps(model.module.config.to_dict(), default=str)
