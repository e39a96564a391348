"""The quantized cache: attention reads what llama.cpp's blocks hold, in one pass and token by token alike."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from compress import artifact
from compress.branching import by_windows
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.divergence import divergence
from compress.numerics.ggml_blocks import decode_blocks, encode_blocks
from compress.plugin import step
from tests.tiny import tiny_model

WINDOW = list(range(3, 60))


def rounded(keys: str = "int8", values: str = "int8") -> Model:
    model = tiny_model(head_dim=32)
    step("quantize.kv_cache")(keys=keys, values=values).apply(model, Context(seed=0))
    return model


@torch.inference_mode()
def test_attention_reads_the_blocks_of_llama_cpp():
    model, floats = rounded("int4", "int8"), tiny_model(head_dim=32)
    caught = {}
    attention = floats.module.model.layers[0].self_attn

    def catch(module, args, kwargs, out):
        caught["x"] = kwargs["hidden_states"].clone()
        caught["rotary"] = [t.clone() for t in kwargs["position_embeddings"]]

    hook = attention.register_forward_hook(catch, with_kwargs=True)
    next(floats.logits([WINDOW]))
    hook.remove()
    x, (cos, sin) = caught["x"], caught["rotary"]
    half = lambda t: torch.cat([-t[..., 16:], t[..., :16]], -1)  # noqa: E731
    q, k, v = (
        p(x).view(1, len(WINDOW), -1, 32).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (t * cos[:, None] + half(t) * sin[:, None] for t in (q, k))
    blocks = lambda t, kind: decode_blocks(encode_blocks(t.reshape(-1, 32), kind), kind).view(t.shape)  # noqa: E731
    both = lambda t: t.repeat_interleave(2, dim=1)  # noqa: E731  two query heads read each
    read = scaled_dot_product_attention(q, both(blocks(k, "q4_0")), both(blocks(v, "q8_0")), is_causal=True)
    expected = attention.o_proj(read.transpose(1, 2).reshape(1, len(WINDOW), -1))
    arguments = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    ours, plain = model.module.model.layers[0].self_attn(**arguments)[0], attention(**arguments)[0]
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))  # float32 sums
    assert (ours - plain).abs().max() > 0.01 * plain.abs().max()


def test_one_pass_token_by_token_and_trees_agree():
    model = rounded("int4", "int4")
    whole = next(model.logits([WINDOW]))
    assert (model.decode_logits(WINDOW) - whole).abs().max() < 1e-3 * whole.abs().max()  # float32 sums
    items = [(WINDOW[:20], [[5, 6, 7], [5, 9], [1]])]
    for ours, plain in zip(next(model.branch_logits(items)), next(iter(by_windows(model, items)))):
        assert torch.allclose(ours, plain, atol=1e-3 * float(plain.abs().max()))


def test_fewer_bits_lose_more_and_are_kept_with_the_artifact(tmp_path):
    floats = next(tiny_model(head_dim=32).logits([WINDOW])).clone()
    losses = {}
    for bits in ("int8", "int4"):
        model = rounded(bits, bits)
        losses[bits] = divergence(floats, next(model.logits([WINDOW]))).kl.mean().item()
    assert 0 < losses["int8"] < 0.05 * losses["int4"]
    artifact.save(model, tmp_path / "a")
    back = artifact.load(tmp_path / "a")
    assert back.cache == model.cache and back.digest == model.digest and "q4_0 cache" in back.compute
    assert torch.equal(next(back.logits([WINDOW])), next(model.logits([WINDOW])))


def test_what_cannot_work_is_refused():
    with pytest.raises(RecipeError, match=r"heads of 8 channels are not a multiple of a cache block's 32"):
        step("quantize.kv_cache")().check(tiny_model().facts)
    with pytest.raises(RecipeError, match=r"has a q8_0 cache already"):
        step("quantize.kv_cache")(keys="int4").apply(rounded(), Context(seed=0))
