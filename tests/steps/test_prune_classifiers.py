"""Fewer channels and blocks of classifiers: encoders, whose norms stand behind each sum, and a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from compress import artifact
from compress.blocks import walk
from compress.classifier import Classifier, texts_of
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.numerics.divergence import divergence
from compress.numerics.products import working_products
from compress.plugin import step
from compress.steps.prune._depth import by_divergence
from compress.steps.prune._fisher import output_fisher
from compress.steps.prune._removal import moments, refit
from compress.steps.prune._structure import reader_of
from compress.steps.prune._taylor import _loss, taylor_scores
from compress.steps.prune.layers import _keep_blocks
from tests import test_decoder_classifier
from tests.test_classifier import rows, windows
from tests.tiny_classifier import KINDS, saved, tiny_classifier

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = (*KINDS, "llama")
CRITERIA = ("activation", "wanda", "fisher", "taylor")
UPDATES = ("none", "output", "stream")
HALF = ("prune.neurons", {"fraction": 0.5, "round_to": 16})
SHORTER = ("prune.layers", {"count": 1, "criterion": "divergence", "tokens": 256})


def tiny(kind: str, **options: Any) -> Classifier:
    """Two random blocks with three classes; biases and norms that matter."""
    model = test_decoder_classifier.tiny(**options) if kind == "llama" else tiny_classifier(kind, **options)
    torch.manual_seed(1)
    for parameter in model.module.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    model.touch()
    return model


def some(model: Classifier) -> list[torch.Tensor]:
    return windows(model)[:20]


def pruned(model: Classifier, name: str, fields: dict[str, Any]) -> Classifier:
    chosen = step(name)(**fields)
    chosen.check(model.facts)
    expected = chosen.facts_after(model.facts)
    chosen.apply(model, Context(seed=0, calibration=some(model)))
    assert model.facts == expected
    return model


def states(model: Classifier) -> torch.Tensor:
    """Those that leave the last block, on the calibration."""
    with torch.no_grad():
        left: torch.Tensor = model.module.base_model(torch.stack(some(model))).last_hidden_state
    return left


def readers(model: Classifier) -> list[str]:
    """The linears of a block that end attention and MLP."""
    return [reader_of(model.facts.architecture, axis) for axis in ("q", "mlp")]


# --- the stream behind a linear --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True])
def test_the_stream_behind_a_linear_is_what_the_norm_reads(kind: str, last: bool) -> None:
    model = tiny(kind)
    arch = model.facts.architecture
    assert tuple(arch.sum_norms.values()) == arch.block_norms and tuple(arch.sum_norms) == tuple(readers(model))
    block = next(walk(model, some(model)))
    entering, left = torch.cat([x.flatten(0, -2) for x in block._states]), torch.cat(block.advance()).flatten(0, -2)
    up: list[torch.Tensor] = []
    block.observe(lambda names, X: up.append(X) if names == block.stages[2] else None)
    for reader, streams in zip(readers(model), ((entering, torch.cat(up)), (torch.cat(up), left)), strict=True):
        X, before, after = map(torch.cat, zip(*block.around(f"{arch.blocks}.0.{reader}", last), strict=True))
        assert torch.equal(torch.cat(block.advance()).flatten(0, -2), left)
        torch.testing.assert_close(before, streams[0], rtol=1e-4, atol=1e-4)
        with torch.no_grad(), working_products():
            linear, norm = (block.module.get_submodule(name) for name in (reader, arch.sum_norms[reader]))
            torch.testing.assert_close(after, before + linear(X).float(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(norm(after), streams[1], rtol=1e-2, atol=1e-2)  # read in bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_counts_by_the_size_of_the_sum_that_the_norm_divides_by(kind: str) -> None:
    model = tiny(kind)
    arch, reader = model.facts.architecture, readers(model)[1]
    block, name = next(walk(model, some(model))), f"{arch.blocks}.0.{reader}"
    sums: list[torch.Tensor] = []
    norm = block.module.get_submodule(arch.sum_norms[reader])
    hook = norm.register_forward_pre_hook(lambda _, args: sums.append(args[0].flatten(0, -2)))
    inputs: list[torch.Tensor] = []
    block.observe(lambda names, X: inputs.append(X) if names == (name,) else None)
    hook.remove()
    H, missing = moments(block, name, [x + 0.5 for x in sums])
    plain, lacking = 0.0, 0.0
    for x, y in zip(torch.cat(inputs).double(), torch.cat(sums).double() + 0.5, strict=True):
        x = torch.cat([x, torch.ones(1)])  # whose weights are the bias
        plain = plain + torch.outer(x, x) / y.square().mean()
        lacking = lacking + torch.outer(torch.full_like(y, 0.5), x) / y.square().mean()
    assert missing is not None
    assert (H - plain).norm() < 1e-5 * plain.norm() and (missing - lacking).norm() < 1e-5 * lacking.norm()


# --- what is removed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        *((kind, HALF[0], {**HALF[1], "criterion": c}) for kind in ALL for c in CRITERIA),
        *((kind, HALF[0], {**HALF[1], "update": u}) for kind in ALL for u in ("none", "stream")),
        *((kind, SHORTER[0], {**SHORTER[1], "update": u}) for kind in ALL for u in ("none", "stream")),
        *((kind, SHORTER[0], {"count": 1}) for kind in ALL),
        ("llama", "prune.heads", {"groups": 1, "queries": 1, "criterion": "fisher", "update": "stream"}),
        *((kind, "prune.hidden", {"fraction": 0.5, "round_to": 16}) for kind in ALL),
    ],
)
def test_the_smaller_classifier_is_an_ordinary_one(
    kind: str, name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(kind)
    before = sum(p.numel() for p in model.module.parameters())
    pruned(model, name, fields)
    assert {n: tuple(p.shape) for n, p in model.module.named_parameters() if p.dim() == 2} == model.facts.matrices
    assert sum(p.numel() for p in model.module.parameters()) < 0.9 * before
    plain = AutoModelForSequenceClassification.from_pretrained(saved(model, tmp_path / "plain"), dtype=torch.float32)
    assert torch.equal(rows(Classifier(plain.eval(), model.tokenizer)), rows(model))
    artifact.save(model, tmp_path / "made")
    assert torch.equal(rows(artifact.load(tmp_path / "made")), rows(model))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoders_heads_and_width_go_together(kind: str) -> None:
    facts = tiny(kind).facts
    message = f"the config of a {kind} cannot say that heads and width no longer divide .* use prune.neurons or"
    with pytest.raises(RecipeError, match=message):
        step("prune.heads")(groups=1).check(facts)
    with pytest.raises(RecipeError, match="fraction=0.2 of 32 .* a multiple of 8, for whole heads of 8 channels"):
        step("prune.hidden")(fraction=0.2, round_to=4).check(facts)
    after = step("prune.hidden")(fraction=0.25, round_to=4).facts_after(facts)
    assert (after.sizes["residual"], after.sizes["pooled"], after.heads, after.kv_heads) == (24, 24, 3, 3)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", ["prune.neurons", "prune.layers", "prune.heads", "prune.hidden"])
def test_nothing_to_remove_changes_no_bit(kind: str, name: str) -> None:
    model, fields = tiny(kind), {"prune.layers": {"count": 0}, "prune.heads": {}}
    pruned(model, name, fields.get(name, {"fraction": 0.0}))
    assert model.digest == tiny(kind).digest


@pytest.mark.parametrize("kind", ALL)
def test_least_squares_over_every_channel_change_no_bit(kind: str) -> None:
    model = tiny(kind)
    for block in walk(model, some(model)):
        name = f"{model.facts.architecture.blocks}.{block.index}.{readers(model)[1]}"
        linear = block.linears[name]
        refit("prune.neurons", name, linear, moments(block, name, None), torch.arange(linear.in_features), 0.1)
    model.touch()
    assert model.digest == tiny(kind).digest


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("update", UPDATES)
def test_channels_that_add_nothing_go_and_the_classes_stay(kind: str, criterion: str, update: str) -> None:
    model = tiny(kind)
    width = model.facts.sizes["mlp"]
    silent = torch.arange(0, width, 2)
    maker = [n for n, axes in model.facts.architecture.linears.items() if axes == ("mlp", "residual")][-1]
    for block in model.module.get_submodule(model.facts.architecture.blocks):
        for _, parameter in block.get_submodule(maker).named_parameters():
            parameter.data[silent] = 0.0
    expected, before = rows(model), states(model)
    pruned(model, HALF[0], {**HALF[1], "criterion": criterion, "update": update})
    torch.testing.assert_close(rows(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ALL)
def test_each_update_comes_nearer_to_the_model_before(kind: str) -> None:
    wanted, errors = states(tiny(kind)), []
    for update in UPDATES:
        fields = {**HALF[1], "update": update, "criterion": "activation", "ridge": 0.01, "random_tokens": 0}
        errors.append(float((states(pruned(tiny(kind), HALF[0], fields)) - wanted).square().mean()))
    assert errors[2] < 0.95 * errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [[0, 1], [0, 2]])
def test_the_block_before_a_gap_aims_at_what_the_last_norm_of_the_gap_reads(kind: str, kept: list[int]) -> None:
    depth = {"n_layers": 3} if kind == "distilbert" else {"num_hidden_layers": 3}
    whole, errors = tiny(kind, **depth), []
    arch, (gap,) = whole.facts.architecture, {0, 1, 2} - set(kept)
    norm, place = arch.block_norms[1], kept.index(gap - 1)  # the block before the gap
    for bridged in (False, True):
        model = tiny(kind, **depth)
        if bridged:
            context = Context(seed=0, calibration=some(model))
            step("prune.layers")(count=1, update="stream")._bridge(model, context, kept)
        else:
            _keep_blocks(model, kept)
        left, blocks = (m.module.get_submodule(arch.blocks) for m in (model, whole))
        assert torch.equal(left[place].get_submodule(norm).weight, blocks[gap].get_submodule(norm).weight) == bridged
        errors.append(float((states(model) - states(whole)).square().mean()))
    assert errors[1] < errors[0], errors


# --- the loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_head_reads_final_states_as_transformers_does(kind: str) -> None:
    model = tiny(kind)
    ids = torch.stack(some(model)[:3])
    with torch.no_grad():
        found = model.head(model.module.base_model(ids).last_hidden_state)
        torch.testing.assert_close(found[:, 0], model.module(ids).logits)


def test_texts_are_taken_apart_where_the_head_reads_their_first_token() -> None:
    model = tiny("bert")
    stream = [2, 7, 8, 3, 2, 9, 3, 2, *[11] * 60]
    found = texts_of(model, list(torch.tensor(stream).split(17)))
    assert [text.tolist() for text in found] == [[2, 7, 8, 3], [2, 9, 3], [2, *[11] * 47]]  # of a context of 48
    plain = [torch.tensor([7, 8]), torch.tensor([9, 10])]
    assert texts_of(model, plain) is plain and texts_of(tiny("llama"), found) is found


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classes_are_drawn_from_the_models_own(kind: str) -> None:
    """So that the mean loss is the entropy."""
    model, generator = tiny(kind), torch.Generator().manual_seed(0)
    window = some(model)[0]
    with torch.no_grad():
        p = model.module(window[None]).logits.double().softmax(dim=1)[0]
        losses = torch.stack([_loss(model, window, generator) for _ in range(400)])
    assert len(set(losses.tolist())) == 3
    spread = float((p * p.log().square()).sum() - (p * p.log()).sum().square()) ** 0.5
    assert abs(float(losses.mean()) + float((p * p.log()).sum())) < 4 * spread / 400**0.5 + 0.02  # bfloat16 products


def backward(model: Classifier, linear: str, seed: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of a linear by block, which hold the gradients of one text's loss, in float32 and whole."""
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    generator = torch.Generator().manual_seed(seed)
    for text in texts_of(model, some(model)):
        seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

        def keep(i: int, X: torch.Tensor, out: torch.Tensor, seen: list[Any] = seen) -> None:
            X.retain_grad()
            out.retain_grad()
            seen.append((i, X, out))

        hooks = [
            block.get_submodule(linear).register_forward_hook(lambda _, args, out, i=i: keep(i, args[0], out))
            for i, block in enumerate(blocks)
        ]
        losses = -model.module(text[None]).logits[0].log_softmax(dim=0)
        u, drawn = float(torch.rand(1, generator=generator)), 0
        while drawn < 2 and u > float((-losses.detach()[: drawn + 1]).exp().sum()):
            drawn += 1
        losses[drawn].backward()
        for hook in hooks:
            hook.remove()
        yield from seen


@pytest.mark.parametrize("kind", ALL)
def test_gradients_equal_a_plain_reference_on_texts(kind: str) -> None:
    model = tiny(kind)
    linear, given = readers(model)[1], texts_of(model, some(model))
    assert (len(given) > 20) == (kind != "llama")
    plain, seconds, tokens = [0.0, 0.0], [0.0, 0.0], sum(map(len, given))
    for i, X, out in backward(tiny(kind), linear, 3):
        plain[i] = plain[i] + (X.detach() * X.grad).abs().flatten(0, -2).sum(dim=0)
        g = out.grad.flatten(0, -2)
        g = g / g.norm(dim=1, keepdim=True).clamp(min=1e-30)
        seconds[i] = seconds[i] + g.T @ g / tokens
    felt = taylor_scores(model, given, linear, 1, seed=3), output_fisher(model, given, linear, seed=3)
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    for found, expected in zip((*felt[0], *felt[1]), (*plain, *seconds), strict=True):
        assert (found - expected).norm() < 0.05 * expected.norm()  # products in bfloat16
    other = step("prune.neurons")(fraction=0.5, criterion="taylor")
    a, b, c = (other.felt(model, Context(seed=s, calibration=some(model)), linear)[1] for s in (3, 3, 4))
    assert torch.equal(a, felt[0][1]) and torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("kind", ALL)
def test_removal_by_kl_compares_the_classes_of_whole_texts(kind: str) -> None:
    model = tiny(kind)
    given = texts_of(model, some(model))[:9]
    parent, _, name = model.facts.architecture.blocks.rpartition(".")
    holder: Any = model.module.get_submodule(parent)
    blocks, found = getattr(holder, name), []
    for left in ([0, 1], [1], [0]):
        setattr(holder, name, torch.nn.ModuleList(blocks[i] for i in left))
        key = model.facts.architecture.keys["layers"]
        setattr(model.module.config, key, len(left))
        with torch.no_grad(), working_products():
            found.append(torch.cat([model.module(text[None], use_cache=False).logits.float() for text in given]))
    setattr(holder, name, blocks)
    setattr(model.module.config, key, 2)
    kls = [float(divergence(found[0], other).kl.mean()) for other in found[1:]]
    ((gone, kl),) = by_divergence(model, given, 1)
    assert gone == kls.index(min(kls)) and kl == pytest.approx(min(kls), rel=0.03)
    chosen = step("prune.layers")(count=1, criterion="divergence", tokens=sum(map(len, given)))
    notes: list[str] = []
    chosen.apply(model, Context(seed=0, calibration=some(model), notes=notes))
    assert notes[0].startswith(f"prune.layers: removed blocks {gone} (")
