"""Steps that store codebooks: what they accept, refuse and keep."""

import pytest
import torch

from compress import artifact
from compress.encodings import Encoding
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.plugin import step
from tests.tiny import tiny_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("fields", [{"encoding": "nf4", "group_size": 16}, {"encoding": "mxfp4"}])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_codebooks_are_stored_saved_and_keep_pruned_weights(fields, search, tmp_path):
    model = tiny_model()
    step("prune.magnitude")(sparsity=0.5).apply(model, Context(seed=0))
    chosen = step("quantize.rtn")(**fields, range=search, embeddings=fields["encoding"])
    chosen.apply(model, Context(seed=0))
    model.touch()
    assert {n: e.encoding for n, e in model.encoded.items()} == chosen.encodings(model.facts)
    assert not model.parameter(UP)[~model.masks[UP]].any() and model.parameter(UP)[model.masks[UP]].any()
    artifact.save(model, tmp_path / "a")
    back = artifact.load(tmp_path / "a")
    assert back.digest == model.digest
    for name, held in back.encoded.items():
        assert torch.equal(held.codes, model.encoded[name].codes) and torch.equal(held.decode(), model.parameter(name))
    overhead = {"nf4": 16 / 16, "mxfp4": 8 / 32}[fields["encoding"]]
    assert Encoding(*model.encoded[UP].encoding.__dict__.values()).bits_per_weight(32) == 4 + overhead


def test_one_group_size_serves_codebooks_beside_integers():
    chosen = step("quantize.rtn")(
        encoding="int4", group_size=16, symmetric=False, keep={"*.down_proj": "mxfp4", "*.o_proj": "nf4"}
    ).encodings(tiny_model().facts)
    assert chosen["model.layers.0.mlp.down_proj.weight"] == Encoding("mxfp4", 32)
    assert chosen["model.layers.0.self_attn.o_proj.weight"] == Encoding("nf4", 16)
    assert chosen[UP] == Encoding("int4", 16, symmetric=False)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"encoding": "mxfp4", "group_size": 64}, "group_size=64: mxfp4 shares a scale over 32"),
        ({"encoding": "nf4", "symmetric": False}, "symmetric: nf4 is a codebook"),
    ],
)
def test_what_a_codebook_would_ignore_is_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        step("quantize.rtn")(**fields)


def test_rounding_a_codebook_again_is_refused():
    model = tiny_model()
    step("quantize.rtn")(encoding="nf4", group_size=16).apply(model, Context(seed=0))
    with pytest.raises(RecipeError, match="rounding twice"):
        step("quantize.rtn")(encoding="int4", group_size=16).apply(model, Context(seed=0))
