"""What is removed, and what makes up for it: heads, blocks by measured KL, residual channels; plain references."""

import pytest
import torch

from compress.blocks import walk
from compress.errors import NumericalError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.divergence import divergence
from compress.numerics.products import working_products
from compress.plugin import step
from compress.steps.prune import _fisher
from compress.steps.prune._depth import by_divergence
from compress.steps.prune._fisher import output_fisher
from compress.steps.prune._removal import SHIFT, moments, random_windows, summed
from compress.steps.prune._taylor import taylor_scores
from tests.steps.test_prune import nll, real_windows
from tests.steps.test_rarity import reads_rare_tokens
from tests.steps.test_structure import WINDOW, check_shapes, logits, reshaped, tiny_copy, windows
from tests.tiny import tiny_model, tiny_of

HEAD = 8  # channels of one head of the tiny model: 4 query heads share 2 key/value heads
UPDATES = ("none", "output", "stream")
CRITERIA = ("activation", "wanda", "fisher", "taylor")


def silence(model: Model, block: int, heads: list[int]) -> None:
    """Let the output projection ignore query heads."""
    weight = model.parameter(f"model.layers.{block}.self_attn.o_proj.weight")
    for head in heads:
        weight.data[:, head * HEAD : (head + 1) * HEAD] = 0.0


def stream_error(model: Model, before: Model) -> float:
    """Mean square by which the final hidden states differ on the calibration."""
    total = 0.0
    for window in windows():
        with torch.no_grad():
            new = model.module.base_model(window[None]).last_hidden_state
            total += float((new - before.module.base_model(window[None]).last_hidden_state).square().mean())
    return total


# --- moments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_token_counts_by_the_size_of_the_stream_it_is_added_to(reader):
    model = tiny_model()
    block = next(walk(model, windows()))
    name = f"model.layers.0.{reader}"
    H, nothing = moments(block, name, None)
    assert nothing is None
    parts = list(block.around(name))
    wanted = [after + torch.linspace(-1, 1, after.shape[1]) for _, _, after in parts]
    G, missing = moments(block, name, wanted)
    plain, shifted, lacking = 0.0, 0.0, 0.0
    for (X, _, after), target in zip(parts, wanted):
        for x, y, z in zip(X.double(), after.double(), target.double()):
            plain += torch.outer(x, x) / y.square().mean()
            shifted += torch.outer(x, x) / z.square().mean()
            lacking += torch.outer(z - y, x) / z.square().mean()
    for found, expected in ((H, plain), (G, shifted), (missing, lacking)):
        assert (found.double() - expected).norm() < 1e-6 * expected.norm()  # sums of float32


@pytest.mark.parametrize("update", ["output", "stream"])
@pytest.mark.parametrize(
    ("kind", "name", "fields", "makers"),
    [
        ("gpt2", "prune.neurons", {"fraction": 0.5}, [("mlp.c_fc", range(0, 64, 2))]),
        ("llama", "prune.neurons", {"fraction": 0.5}, [(f"mlp.{n}_proj", range(0, 64, 2)) for n in ("gate", "up")]),
        ("llama", "prune.heads", {"groups": 1}, [("self_attn.v_proj", range(16))]),
    ],
)
def test_what_constant_channels_add_goes_into_the_bias_of_their_reader(kind, name, fields, makers, update):
    model = tiny_of(kind, attention_bias=True, mlp_bias=True) if kind == "llama" else tiny_of(kind)
    for block in model.module.get_submodule(model.facts.architecture.blocks):
        for maker, channels in makers:
            linear = block.get_submodule(maker)
            linear.weight.data[list(channels)], linear.bias.data[list(channels)] = 0.0, 0.2
    expected = logits(model)
    reshaped(name, {**fields, "update": update, "criterion": "activation"}, model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-3)  # bfloat16 products of constants


def test_random_windows_follow_the_seed_and_hold_every_plain_token():
    model = tiny_model()
    model.tokenizer.add_special_tokens({"bos_token": model.tokenizer.convert_ids_to_tokens(7)})
    (*first, _), again, other = (random_windows(model, windows(40), 0.1, seed) for seed in (3, 3, 4))
    assert len(again) == 4 and all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(again[0], other[0]) and {len(w) for w in again} == {len(windows()[0])}
    many = torch.cat(random_windows(model, windows(200), 1.0, 0))
    assert set(range(model.facts.vocabulary)) - set(many.tolist()) == {*model.tokenizer.all_special_ids} >= {7}
    assert random_windows(model, windows(40), 0.0, 0) == []


@pytest.mark.parametrize(("count", "told"), [(4, True), (5, False)])
def test_too_few_windows_for_random_tokens_are_told(count, told):
    notes = []
    chosen = step("prune.neurons")(fraction=0.5)
    chosen.apply(tiny_model(), Context(seed=0, calibration=windows(count), notes=notes))
    said = "prune.neurons: without random tokens, as 0.125 of 4 windows is no more than half a one"
    assert (said in notes) == told and len(notes) == 1 + told
    assert len(random_windows(tiny_model(), windows(count), 0.125, 0)) == 1 - told


def test_random_tokens_are_drawn_by_zipfs_law():
    model, law = tiny_model(), 1 / (torch.arange(256.0) + SHIFT)
    drawn = torch.cat(random_windows(model, windows(2000), 1.0, 0))
    found = torch.bincount(drawn, minlength=256).view(8, 32).sum(dim=1) / len(drawn)
    expected = law.view(8, 32).sum(dim=1) / law.sum()
    assert (found - expected).abs().max() < 4 * (expected.max() / len(drawn)) ** 0.5 < 0.01
    assert expected[0] > 2 * expected[-1]


@pytest.mark.parametrize("share,stays", [(0.0, False), (0.5, True)])
def test_a_channel_for_tokens_that_the_calibration_lacks_stays_for_random_ones(share, stays):
    """One residual channel tells tokens from 128 on, one MLP channel reads it alone; calibration has none of them."""
    model = tiny_model()
    reads_rare_tokens(model, 128, 4.0)
    calibration = [window % 128 for window in windows()]
    pruned = step("prune.neurons")(fraction=0.25, round_to=16, random_tokens=share)
    pruned.apply(model, Context(seed=0, calibration=calibration))
    found = (model.module.model.layers[0].mlp.gate_proj.weight == torch.eye(32)[0] * 2.0).all(dim=1)
    assert bool(found.any()) == stays


# --- heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("fields", "silent", "left"),
    [
        ({"queries": 2}, [[1, 2], [0, 3]], [[0, 3], [1, 2]]),
        ({"groups": 1}, [[0, 1], [2, 3]], [[2, 3], [0, 1]]),
        ({"groups": 1, "queries": 1}, [[0, 1, 2], [1, 2, 3]], [[3], [0]]),
    ],
)
def test_silent_heads_go_and_the_function_stays(update, criterion, fields, silent, left):
    model, notes = tiny_model(), []
    for block, heads in enumerate(silent):
        silence(model, block, heads)
    expected = logits(model)
    rows = [
        torch.cat([model.parameter(f"model.layers.{i}.self_attn.q_proj.weight").view(4, HEAD, -1)[h] for h in heads])
        for i, heads in enumerate(left)
    ]
    small = reshaped("prune.heads", {**fields, "update": update, "criterion": criterion}, tiny_copy(model), notes)
    check_shapes(small)
    for i in range(2):
        assert torch.equal(small.parameter(f"model.layers.{i}.self_attn.q_proj.weight"), rows[i])
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small.decode_logits(WINDOW), expected, rtol=1e-4, atol=1e-4)
    heads, groups = len(left[0]), 2 - fields.get("groups", 0)
    assert notes == [
        f"prune.heads: {heads} of 4 query heads and {groups} of 2 key/value heads remain in each block",
    ]
    config = small.module.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, groups, HEAD)


@pytest.mark.parametrize("name", ["prune.heads", "prune.neurons"])
def test_each_update_comes_nearer_to_the_model_before(name):
    fields = {"queries": 2} if name == "prune.heads" else {"fraction": 0.5}
    errors = [stream_error(reshaped(name, {**fields, "update": u}), tiny_model()) for u in UPDATES]
    assert errors[2] < errors[1] < errors[0], errors


def test_pruning_twice_goes_on_from_the_smaller_model():
    model = reshaped("prune.heads", {"queries": 2})
    check_shapes(reshaped("prune.heads", {"groups": 1}, model))
    assert (model.facts.heads, model.facts.kv_heads, model.facts.head_size) == (1, 1, HEAD)


@pytest.mark.parametrize(("criterion", "left"), [("wanda", 0), ("activation", 1)])
def test_a_group_of_two_middling_heads_beats_one_strong_head_where_scores_add(criterion, left):
    """Heads worth 3, 4 and 0, 6: the sums are 7 and 6, the sums of squares 25 and 36."""
    model = tiny_model()
    heads = step("prune.heads")(groups=1, criterion=criterion)
    block, name, (H, _) = next(summed(model, Context(seed=0, calibration=windows()), heads, "self_attn.o_proj"))
    weight = block.linears[name].weight.data
    weight *= (torch.tensor([3.0, 4.0, 0.0, 6.0]) / heads.scores(weight, H, None, HEAD)).repeat_interleave(HEAD)
    rows = model.parameter("model.layers.0.self_attn.q_proj.weight").view(2, 2 * HEAD, -1)[left]
    heads.apply(model, Context(seed=0, calibration=windows()))
    assert torch.equal(model.parameter("model.layers.0.self_attn.q_proj.weight"), rows)


def after_backward(model: Model, linear: str, window: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of a linear by block, which hold the gradients of one window's loss, in float32."""
    seen = {}

    def keep(i: int, X: torch.Tensor, out: torch.Tensor) -> None:
        X.retain_grad()
        out.retain_grad()
        seen[i] = (X, out)

    hooks = [
        model.module.get_submodule(f"model.layers.{i}.{linear}").register_forward_hook(
            lambda _, args, out, i=i: keep(i, args[0], out)
        )
        for i in range(2)
    ]
    logits = model.module(window[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return seen


def plain_taylor(model: Model, linear: str, size: int) -> list[list[float]]:
    """Autograd on one window at a time, in float32, and loops."""
    found = [[0.0] * (model.module.get_submodule(f"model.layers.{i}.{linear}").in_features // size) for i in range(2)]
    for window in windows():
        for i, (X, _) in after_backward(model, linear, window).items():
            for t in range(X.shape[1]):
                for c in range(len(found[i])):
                    at = slice(c * size, (c + 1) * size)
                    found[i][c] += abs(float((X.detach()[0, t, at] * X.grad[0, t, at]).sum()))
    return found


@pytest.mark.parametrize(("linear", "size"), [("self_attn.o_proj", HEAD), ("mlp.down_proj", 1)])
def test_taylor_scores_equal_a_plain_reference_and_leave_no_gradient(linear, size):
    model = tiny_model()
    flags = [p.requires_grad for p in model.module.parameters()]
    found = taylor_scores(model, windows(), linear, size)
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())
    for scores, plain in zip(found, plain_taylor(tiny_model(), linear, size), strict=True):
        torch.testing.assert_close(scores, torch.tensor(plain), rtol=0.05, atol=0.02 * max(plain))  # bfloat16


def plain_fisher(model: Model, linear: str, read: list[torch.Tensor]) -> list[torch.Tensor]:
    """Autograd on one window at a time, in float32, and loops."""
    sums = [0.0, 0.0]
    for window in read:
        for i, (_, out) in after_backward(model, linear, window).items():
            for g in out.grad[0]:
                sums[i] = sums[i] + torch.outer(g, g) / max(float(g @ g), 1e-30)
    return [total / sum(map(len, read)) for total in sums]


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("read", [1, 2])
def test_directions_of_gradients_equal_a_plain_reference_and_leave_no_gradient(linear, read, monkeypatch):
    model, given = tiny_model(), windows()
    length, n = len(given[0]), model.facts.sizes["residual"]
    monkeypatch.setattr(_fisher, "TOKENS_PER_CHANNEL", (read * length - 1) / n)
    flags = [p.requires_grad for p in model.module.parameters()]
    found = output_fisher(model, given, linear)
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())
    assert len(given) > read and all(float(G.trace()) <= 1 + 1e-5 for G in found)
    for G, plain in zip(found, plain_fisher(tiny_model(), linear, given[:read]), strict=True):
        torch.testing.assert_close(G, plain, rtol=0.05, atol=0.02 * float(plain.abs().max()))  # bfloat16


def test_a_head_is_felt_by_the_squares_of_its_channels():
    model = tiny_model()
    block = next(walk(model, windows()))
    name = "model.layers.0.self_attn.o_proj"
    H, W = moments(block, name, None)[0], block.linears[name].weight.detach()
    heads = step("prune.heads")(queries=2, criterion="fisher")
    (G, _) = heads.felt(model, Context(seed=0, calibration=windows()), "self_attn.o_proj", HEAD)
    plain = [
        sum(float(W[:, j] @ G @ W[:, j] * H[j, j]) for j in range(h * HEAD, h * HEAD + HEAD)) ** 0.5 for h in range(4)
    ]
    torch.testing.assert_close(heads.scores(W, H, G, HEAD), torch.tensor(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_the_caller_asks_for_none_and_leave_no_hook(without):
    model, expected = tiny_model(), output_fisher(tiny_model(), windows(), "mlp.down_proj")
    with without():
        found = output_fisher(model, windows(), "mlp.down_proj")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_texts_that_ask_for_nothing_choose_nothing():
    model = tiny_model()
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.down_proj: no gradient reaches its output"):
        output_fisher(model, [window[:1] for window in windows()], "mlp.down_proj")


def test_gradients_that_are_not_finite_name_the_linear():
    model = tiny_model()
    linear = model.module.get_submodule("model.layers.1.mlp.down_proj")
    linear.register_forward_hook(lambda _, args, out: out + (out * 0).sqrt())  # of infinite slope
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.down_proj: non-finite gradients"):
        output_fisher(model, windows(), "mlp.down_proj")


def test_a_loss_that_is_not_finite_names_the_block_or_itself():
    model = tiny_model()
    model.parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.1: non-finite hidden states"):
        output_fisher(model, windows(), "mlp.down_proj")
    model = tiny_model()
    model.parameter("model.norm.weight").data[0] = torch.inf
    with pytest.raises(NumericalError, match="non-finite loss on the calibration data"):
        output_fisher(model, windows(), "mlp.down_proj")


@pytest.mark.model
def test_what_the_loss_feels_chooses_better_channels_than_norms_on_the_real_model(real_baseline, real_model):
    calibration = real_windows(real_baseline, 8, 512)
    evaluation = real_windows(real_baseline, 6, 256, skip=5000)
    losses = {}
    for criterion in ("fisher", "activation"):
        model = real_model()
        fields = {"fraction": 0.271, "criterion": criterion, "update": "none"}
        step("prune.neurons")(**fields).apply(model, Context(seed=0, calibration=calibration))
        losses[criterion] = nll(model, evaluation)
    # measured: 2.861, then 3.662 and 3.729 nats over 1,530 paired tokens
    assert nll(real_baseline, evaluation) < losses["fisher"] < losses["activation"] - 0.03, losses


# --- layers -----------------------------------------------------------------------------------------------


def three_blocks() -> Model:
    """A tiny model of three blocks, the middle one of which hardly changes the hidden state's direction."""
    import copy

    from transformers import LlamaForCausalLM

    twin = tiny_model()
    config = copy.deepcopy(twin.module.config)
    config.num_hidden_layers = 3
    torch.manual_seed(1)
    model = Model(LlamaForCausalLM(config), twin.tokenizer)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.parameter(f"model.layers.1.{name}.weight").data.mul_(0.1)
    return model


def plain_kl(model: Model, kept: list[int]) -> float:
    """Whole forward passes of transformers with some blocks alone."""
    blocks, total, tokens = model.module.model.layers, 0.0, 0
    for window in windows(2):
        found = []
        for chosen in ([0, 1, 2], kept):
            model.module.model.layers = torch.nn.ModuleList(blocks[i] for i in chosen)
            model.module.config.num_hidden_layers = len(chosen)
            with torch.no_grad(), working_products():
                found.append(model.module(window[None], use_cache=False).logits[0].float())
        total, tokens = total + float(divergence(*found).kl.sum()), tokens + len(window)
    model.module.model.layers, model.module.config.num_hidden_layers = blocks, 3
    return total / tokens


def test_greedy_removal_by_kl_equals_whole_passes():
    model = three_blocks()
    (first, kl), (second, both) = by_divergence(model, windows(2), 2)
    singles = {i: plain_kl(model, [j for j in range(3) if j != i]) for i in range(3)}
    assert first == min(singles, key=singles.__getitem__) == 1
    assert kl == pytest.approx(singles[1], rel=0.02)
    pairs = {i: plain_kl(model, [2 - i]) for i in (0, 2)}
    assert second == min(pairs, key=pairs.__getitem__) and both == pytest.approx(pairs[second], rel=0.02)


def test_the_block_before_a_gap_makes_up_for_it():
    errors, notes = {}, []
    for update in ("none", "stream"):
        fields = {"count": 1, "criterion": "divergence", "update": update, "tokens": 64}
        model = reshaped("prune.layers", fields, three_blocks(), notes)
        errors[update] = stream_error(model, three_blocks())
        others = three_blocks()
        others = [others.parameter(f"model.layers.{i}.mlp.down_proj.weight") for i in (0, 2)]
        same = [torch.equal(model.parameter(f"model.layers.{i}.mlp.down_proj.weight"), others[i]) for i in range(2)]
        assert same == [update == "none", True]
    assert errors["stream"] < errors["none"], errors
    assert all("removed blocks 1 (" in note and "by divergence, of 3" in note for note in notes)


def test_non_finite_logits_name_the_block():
    model = three_blocks()
    model.parameter("model.layers.2.mlp.down_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="model.layers.0: non-finite"):
        reshaped("prune.layers", {"count": 1, "criterion": "divergence"}, model)


# --- hidden -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [False, True])
def test_residual_channels_that_nothing_uses_go_and_the_function_stays(update):
    """Silent channels are zero throughout: the norms' root mean square is then larger by a known factor."""
    model, notes = tiny_model(), []
    silent = torch.arange(0, 32, 2)
    with torch.no_grad():
        model.parameter("model.embed_tokens.weight")[:, silent] = 0.0
        for i in range(2):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.parameter(f"model.layers.{i}.{name}.weight")[silent] = 0.0
    expected = logits(model)
    fields = {"fraction": 0.5, "round_to": 16, "update": update}
    small = reshaped("prune.hidden", fields, tiny_copy(model), notes)
    check_shapes(small)
    torch.testing.assert_close(logits(small), expected, rtol=1e-3, atol=1e-3)  # the epsilon of the norms
    assert small.parameter("model.norm.weight").tolist() == pytest.approx([2**0.5] * 16, rel=1e-4)
    assert notes == ["prune.hidden: 16 of 32 residual channels remain"]
    assert (small.module.config.hidden_size, small.module.config.head_dim) == (16, HEAD)


def test_refitted_readers_stay_nearer():
    errors = {}
    for update in (False, True):
        small = reshaped("prune.hidden", {"fraction": 0.25, "round_to": 8, "update": update})
        total = 0.0
        for window in windows():
            pair = [next(m.logits([window.tolist()])) for m in (tiny_model(), small)]
            total += float(divergence(*pair).kl.mean())
        errors[update] = total
    assert errors[True] < errors[False], errors


def test_all_four_in_a_row_leave_an_ordinary_model():
    model = three_blocks()
    reshaped("prune.layers", {"count": 1}, model)
    reshaped("prune.heads", {"queries": 2, "criterion": "taylor"}, model)
    reshaped("prune.neurons", {"fraction": 0.5}, model)
    reshaped("prune.hidden", {"fraction": 0.25, "round_to": 8}, model)
    check_shapes(model)
    torch.testing.assert_close(model.decode_logits(WINDOW), logits(model), rtol=1e-4, atol=1e-4)
    step("prune.wanda")(pattern="2:4").apply(model, Context(seed=0, calibration=windows()))
    step("quantize.gptq")(group_size=8).apply(model, Context(seed=0, calibration=windows()))
    assert all(not model.parameter(name)[~mask].any() for name, mask in model.masks.items())
