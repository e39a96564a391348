"""Activation-aware scales: folding changes no function, and the search is what it says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compress.encodings import EncodedTensor, Encoding
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from compress.steps.quantize._fields import round_to_nearest
from compress.steps.quantize._folding import fold
from compress.steps.quantize.awq import channel_scales, output_error
from tests.inputs import inputs_of, windows
from tests.tiny import byte_tokenizer, tiny_model, tiny_module

INT4 = Encoding("int4", 16)
WINDOW = [list(range(3, 60))]


def small(family: str, kv_heads: int) -> Model:
    """Two layers with gains, biases and value heads that all matter."""
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[
        family
    ]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attention_bias=True,
    )
    model = Model(model_class(config), byte_tokenizer())
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def moments(seed: int, m: int = 48, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (tokens, m) of channels a hundred times louder than others, and Σ xxᵀ."""
    generator = torch.Generator().manual_seed(seed)
    loudness = 10 ** (2 * torch.rand(m, generator=generator) - 1)
    X = (torch.randn(tokens, m // 4, generator=generator) @ torch.randn(m // 4, m, generator=generator)) * loudness
    return X, X.T @ X


@pytest.mark.parametrize("family,kv_heads", [("llama", 4), ("llama", 2), ("qwen2", 4)])
def test_folding_any_scales_leaves_the_function_as_it_was(family, kv_heads):
    model = small(family, kv_heads)
    before = next(model.logits(WINDOW)).clone()
    digest, folded = model.digest, []
    generator = torch.Generator().manual_seed(1)
    for block in range(2):
        for source, readers in model.facts.folds(block):
            m = model.parameter(f"{readers[0]}.weight").shape[1]
            fold(model, source, readers, 4 ** (2 * torch.rand(m, generator=generator) - 1))
            folded.append((source, *readers))
    after = next(model.logits(WINDOW))
    assert before.std() > 0.5 and (after - before).abs().max() < 1e-4 * before.abs().max()  # float32 rounding
    assert model.digest != digest
    assert (("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj") in folded) == (kv_heads == 4)
    assert {n for names in folded for n in names[1:]} | {n for n in model.facts.linears if "o_proj" in n} == set(
        model.facts.linears
    )


def test_the_error_is_that_of_the_outputs():
    X, H = moments(0)
    W = torch.randn(10, 48, generator=torch.Generator().manual_seed(1))
    for alpha in (0.0, 0.5):
        s = channel_scales(H, alpha)
        rounded = round_to_nearest("w", W * s, INT4, search=False).decode() / s
        plain = ((X.double() @ (rounded - W).double().T) ** 2).sum()
        assert output_error(W, s, H, INT4) == pytest.approx(float(plain), rel=1e-3)  # float32 sums


def test_scales_are_powers_of_root_mean_squares():
    X, H = moments(2)
    X[:, 5] = 0.0
    H = X.T @ X
    rms = X.square().mean(0).sqrt()
    s = channel_scales(H, 0.5)
    heard = torch.arange(48) != 5
    ratio = (s / rms.sqrt())[heard]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
    assert s.max() * s.min() == pytest.approx(1, rel=1e-5) and s[5] == s.min()
    assert torch.equal(channel_scales(H, 0.0), torch.ones(48)) and torch.equal(
        channel_scales(torch.zeros(4, 4), 0.5), torch.ones(4)
    )


@pytest.mark.parametrize("encoding", [INT4, Encoding("int4", 16, False), Encoding("int3", 16), Encoding("nf4", 16)])
def test_some_scale_beats_none_where_channels_differ(encoding):
    _, H = moments(3)
    W = torch.randn(40, 48, generator=torch.Generator().manual_seed(4))
    errors = [output_error(W, channel_scales(H, i / 20), H, encoding) for i in range(20)]
    assert min(errors) < 0.8 * errors[0]


def reference(
    model: Model, block: int, alphas: int, encoding: Encoding
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Scaled weights of a block and their inputs, caught by hooks, without second moments of them."""
    names = [name for name in model.facts.linears if f".{block}." in name]
    inputs = inputs_of(model, names, windows(20))
    weights = {n: model.parameter(f"{n}.weight").detach().double() for n in names}
    for source, readers in model.facts.folds(block):
        X = inputs[readers[0]]
        best, least = torch.ones(X.shape[1]).double(), float("inf")
        for i in range(alphas):
            s = X.square().mean(0).sqrt() ** (i / alphas)
            s = s / (s.max() * s.min()).sqrt()
            error = 0.0
            for n in readers:
                rounded = round_to_nearest(n, (weights[n] * s).float(), encoding, search=False).decode().double() / s
                error += float((X @ (rounded - weights[n]).T).square().sum())
            if error < least:
                best, least = s, error
        for n in readers:
            weights[n], inputs[n] = weights[n] * best, inputs[n] / best
        if source in weights:
            weights[source] = weights[source] / best.unsqueeze(1)
    return weights, inputs


@pytest.mark.parametrize("working", ["float32"], indirect=True)
@pytest.mark.parametrize("range", ["minmax", "mse"])
def test_every_block_equals_a_plain_version_fed_by_the_rounded_ones_before_it(range, working):
    model, rounded = small("llama", 4), small("llama", 4)
    chosen = step("quantize.awq")(group_size=16, alphas=5, range=range, embeddings=None)
    chosen.apply(rounded, Context(seed=0, calibration=windows(20)))
    for block in (0, 1):
        expected, inputs = reference(model, block, 5, INT4)
        assert len(expected) == 7
        for name, W in expected.items():
            held = rounded.encoded[f"{name}.weight"]
            importance = inputs[name].square().sum(0).float()
            wanted = round_to_nearest(name, W.float(), INT4, range == "mse", importance)
            # float32 against float64: a weight on an edge may fall on either side
            assert (held.decode() - wanted.decode()).norm() < 0.02 * wanted.decode().norm(), name
            assert (held.codes == wanted.codes).float().mean() > 0.99, name
        model.module.model.layers[block] = rounded.module.model.layers[block]
    gain = rounded.parameter("model.layers.0.input_layernorm.weight")
    assert (gain / small("llama", 4).parameter("model.layers.0.input_layernorm.weight")).std() > 0.1  # it did scale


def test_pruned_weights_stay_zero_and_gains_stay_floats():
    model = tiny_model()
    step("prune.magnitude")(sparsity=0.5).apply(model, Context(seed=0))
    gain = "model.layers.0.input_layernorm.weight"
    before = model.parameter(gain).detach().clone()
    chosen = step("quantize.awq")(group_size=16)
    chosen.apply(model, Context(seed=0, calibration=windows(8)))
    assert {n: e.encoding for n, e in model.encoded.items()} == chosen.encodings(model.facts)
    for name, mask in model.masks.items():
        assert not model.parameter(name)[~mask].any() and model.parameter(name)[mask].any()
    assert gain not in model.encoded and not torch.equal(model.parameter(gain), before)


def test_stored_tensors_are_not_scaled_and_floats_need_no_scale():
    model = tiny_model()
    gain = "model.layers.0.input_layernorm.weight"
    model.store(gain, EncodedTensor(Encoding("fp16"), model.parameter(gain).detach().half()))
    held = model.encoded[gain].codes.clone()
    later = "model.layers.1.post_attention_layernorm.weight"
    before = model.parameter(later).detach().clone()
    context = Context(seed=0, calibration=windows(8))
    kept = {"*.gate_proj": "fp32", "*.up_proj": "fp16"}
    step("quantize.awq")(group_size=16, keep=kept).apply(model, context)
    assert torch.equal(model.encoded[gain].codes, held)
    assert [note for note in context.notes if "not scaled" in note] == [
        f"{gain.removesuffix('.weight')}: not scaled, since {gain} is stored in an encoding already"
    ]
    assert torch.equal(model.parameter(later), before)  # neither reader holds codes


def test_norms_of_linears_that_are_left_out_or_need_no_scale_keep_every_bit():
    model = Model(tiny_module("gemma"), byte_tokenizer())
    model.module.generation_config.eos_token_id = 1
    gains = {n: p.detach().clone() for n, p in model.module.named_parameters() if n.endswith("layernorm.weight")}
    assert any(not torch.equal((g + 1) / 1 - 1, g) for g in gains.values())  # what folding ones would do
    changed = "model.layers.0.post_attention_layernorm.weight"
    step("quantize.awq")(layers=["*.0.mlp.up_proj"]).apply(model, Context(seed=0, calibration=windows(8)))
    assert [n for n, g in gains.items() if not torch.equal(model.parameter(n), g)] == [changed]
    model = Model(tiny_module("gemma"), byte_tokenizer())
    model.module.generation_config.eos_token_id = 1
    step("quantize.awq")(alphas=1).apply(model, Context(seed=0, calibration=windows(8)))  # α = 0 alone
    assert all(torch.equal(model.parameter(n), g) for n, g in gains.items())


@pytest.mark.model
def test_scales_lose_less_than_rounding_on_the_real_model(real_model, real_baseline):
    from compress import data
    from compress.numerics.divergence import divergence

    requests = [data.Request("calibration", "wiki", 4096, 512), data.Request("evaluation", "wiki")]
    calibration, evaluation = data.split(requests, 0)
    packed = data.pack(calibration, real_baseline.encode, 2)
    held_out = [real_baseline.encode(d.text)[:256] for d in evaluation.documents[:10]]
    expected = [logits.clone() for logits in real_baseline.logits(held_out)]
    found = {}
    for name, fields in (("quantize.rtn", {}), ("quantize.awq", {"alphas": 6})):
        model = real_model()
        step(name)(encoding="int4", group_size=64, **fields).apply(model, Context(seed=0, calibration=packed))
        pairs = zip(expected, model.logits(held_out))
        found[name] = torch.cat([divergence(p, q).kl for p, q in pairs]).mean().item()
    assert found["quantize.awq"] < 0.8 * found["quantize.rtn"], found
