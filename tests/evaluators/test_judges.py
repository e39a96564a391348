"""Opening models that judge text: what is refused, and that nothing is drawn at random unseen."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, T5Config, T5Model

from compress.errors import Corrupt, RecipeError, UnsafeInput
from evaluators import _judges
from tests.evaluators.harness import no_network
from tests.evaluators.judges import letter_tokenizer, save_bert

__all__ = ["no_network"]  # a fixture


def test_a_judge_is_the_saved_model_in_float32(tmp_path):
    folder = save_bert(tmp_path / "bert")
    judge = _judges.opened("encoder", str(folder))
    assert judge is _judges.opened("encoder", str(folder)) and judge.limit == 64 and not judge.module.training
    ids = judge.tokens("a text")
    assert judge.tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", "a", "t", "##e", "##x", "##t", "[SEP]"]
    with torch.inference_mode():
        want = BertModel.from_pretrained(folder)(ids).last_hidden_state
        assert torch.equal(judge.module(ids).last_hidden_state, want) and want.dtype == torch.float32
    assert judge.tokens("a " * 100).shape == (1, 64)


def test_changed_files_are_another_judge(tmp_path):
    folder = str(save_bert(tmp_path / "bert"))
    before, judge = _judges.digest(folder), _judges.opened("encoder", folder)
    save_bert(tmp_path / "bert", seed=1)
    assert _judges.digest(folder) != before and _judges.opened("encoder", folder) is not judge


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_an_encoder_without_its_pooler_is_one_and_without_a_layer_is_none(tmp_path):
    folder = save_bert(tmp_path / "bert")
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("pooler.")])
    _judges.opened("encoder", str(folder))
    edit(folder, lambda t: t.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(Corrupt, match=r"no encoder: tensor encoder\.layer\.1\.output\.dense\.weight is missing"):
        _judges.opened("encoder", str(folder))


def test_an_encoder_is_no_classifier_with_a_random_head(tmp_path):
    with pytest.raises(Corrupt, match=r"no classifier: tensor classifier\.bias is missing \(and 1 more\)"):
        _judges.opened("classifier", str(save_bert(tmp_path / "bert")))


def test_what_could_run_code_or_is_elsewhere_is_refused(tmp_path):
    folder = save_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Bert"}}))
    for look in (lambda: _judges.known_config(str(folder)), lambda: _judges.opened("encoder", str(folder))):
        with pytest.raises(UnsafeInput, match="remote code"):
            look()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match=r"pytorch_model\.bin could execute code"):
        _judges.opened("encoder", str(folder))
    with pytest.raises(RecipeError, match="no such file or folder"):
        _judges.known_config(str(tmp_path / "none"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match="expected a folder of safetensors"):
        _judges.known_config(str(tmp_path / "model.gguf"))


def test_nothing_is_asked_of_the_hub_before_it_must(no_network):
    assert _judges.known_config("org/name") is None


def test_a_model_that_needs_a_second_text_is_refused(tmp_path):
    config = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    T5Model(config).save_pretrained(tmp_path / "t5")
    letter_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(RecipeError, match="an encoder-decoder"):
        _judges.opened("encoder", str(tmp_path / "t5"))
