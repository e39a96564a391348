"""Tokens of the calibration that count by how rare they are there: plain references, and what it changes."""

import pytest
import torch

from compress.blocks import walk
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from compress.steps.prune._removal import moments, random_windows, rarity, summed
from tests.steps.test_structure import windows
from tests.tiny import tiny_model


def reads_rare_tokens(model: Model, first: int, scale: float) -> None:
    """Residual channel 0 tells tokens from the first on, and MLP channel 5 of block 0 reads it alone."""
    embedding, block = model.parameter("model.embed_tokens.weight").data, model.module.model.layers[0]
    embedding[:, 0] = torch.arange(256).ge(first) * 3.0
    block.self_attn.o_proj.weight.data.zero_()
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight.data[:, 0] = 0.0
        linear.weight.data[5] = torch.eye(32)[0] * 2.0
    block.mlp.down_proj.weight.data[:, 5] *= scale
    model.touch()


@pytest.mark.parametrize("wanting", [False, True])
def test_a_token_counts_by_how_often_it_is_among_the_others(wanting):
    model, given, power = tiny_model(), windows(), 0.3
    drawn = random_windows(model, given, 0.5, 0)
    name, tokens = "model.layers.0.mlp.down_proj", torch.cat(given).tolist()
    counts = rarity(given, drawn, power)
    found = [(1 + tokens.count(token)) ** -power for token in tokens]
    plain = [c * len(found) / sum(found) for c in found] + [1.0] * sum(map(len, drawn))
    torch.testing.assert_close(counts, torch.tensor(plain))
    assert len(set(plain)) > 3 and len(drawn) > 0
    block = next(walk(model, [*given, *drawn]))
    parts = list(block.around(name))
    wanted = [after + 0.5 for _, _, after in parts] if wanting else None
    H, missing = moments(block, name, wanted, counts)
    squares, lacking, read = 0.0, 0.0, 0
    for X, _, after in parts:
        for x, y in zip(X.double(), after.double()):
            z = y + 0.5 * wanting
            squares += plain[read] * torch.outer(x, x) / z.square().mean()
            lacking += plain[read] * torch.outer(z - y, x) / z.square().mean()
            read += 1
    assert read == len(counts) and (H - squares).norm() < 1e-5 * squares.norm()
    assert (missing is None) != wanting and (missing is None or (missing - lacking).norm() < 1e-5 * lacking.norm())


@pytest.mark.parametrize("name,fields", [("neurons", {"fraction": 0.25, "round_to": 16}), ("heads", {"queries": 2})])
@pytest.mark.parametrize("update", ["output", "stream"])
def test_where_all_tokens_are_equally_frequent_none_counts_more(name, fields, update):
    calibration = list(torch.arange(256).view(16, 16).T.contiguous())
    alike, weighed = (tiny_model() for _ in range(2))
    for model, power in ((alike, 0.0), (weighed, 1.0)):
        chosen = step(f"prune.{name}")(update=update, inverse_frequency=power, random_tokens=0.25, **fields)
        chosen.apply(model, Context(seed=0, calibration=calibration))
    assert all(torch.allclose(a, weighed.tensor(name), 1e-5, 1e-6) for name, a in alike.tensors())


@pytest.mark.parametrize("power,stays", [(0.0, False), (1.0, True)])
def test_a_channel_for_rare_tokens_stays_where_they_count_by_their_rarity(power, stays):
    """One residual channel tells tokens from 192 on, one MLP channel reads it alone; the others are hundreds each."""
    model = tiny_model()
    reads_rare_tokens(model, 192, 0.0056)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randint(3, 8, (4032,), generator=generator), torch.arange(192, 256)])
    calibration = list(tokens[torch.randperm(4096, generator=generator)].view(64, 64))
    fields = {"fraction": 0.25, "round_to": 16, "random_tokens": 0, "inverse_frequency": power}
    step("prune.neurons")(**fields).apply(model, Context(seed=0, calibration=calibration))
    assert bool((model.module.model.layers[0].mlp.gate_proj.weight == torch.eye(32)[0] * 2.0).all(dim=1).any()) == stays


def test_a_block_is_judged_by_what_each_of_its_tokens_counts():
    """One window at a time, against all of them as the step reads them."""
    model, given = tiny_model(), windows(10)
    chosen = step("prune.neurons")(fraction=0.25, round_to=16, random_tokens=0.5, inverse_frequency=0.7)
    block, name, (H, missing) = next(summed(model, Context(seed=0, calibration=given), chosen, "mlp.down_proj"))
    assert (block.index, name, missing) == (0, "model.layers.0.mlp.down_proj", None)
    tokens, plain = torch.cat(given), torch.zeros_like(H)
    found = {int(token): (1 + int((tokens == token).sum())) ** -0.7 for token in tokens}
    mean = sum(found[int(token)] for token in tokens) / len(tokens)
    drawn = random_windows(model, given, 0.5, 0)
    for window in given:
        counts = torch.tensor([found[int(token)] / mean for token in window])
        plain += moments(next(walk(model, [window])), name, None, counts)[0]
    for window in drawn:
        plain += moments(next(walk(model, [window])), name, None)[0]
    assert len(drawn) == 5 and (H - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("name,fields", [("neurons", {"fraction": 0.25, "round_to": 16}), ("heads", {"queries": 2})])
@pytest.mark.parametrize("update", ["output", "stream"])
def test_where_some_tokens_are_rare_they_change_what_is_left(name, fields, update):
    generator = torch.Generator().manual_seed(0)
    calibration = [torch.randint(3, 256, (64,), generator=generator).square() // 256 for _ in range(8)]
    alike, weighed = (tiny_model() for _ in range(2))
    for model, power in ((alike, 0.0), (weighed, 1.0)):
        chosen = step(f"prune.{name}")(update=update, inverse_frequency=power, **fields)
        chosen.apply(model, Context(seed=0, calibration=calibration))
    for linear in ("self_attn.o_proj", "mlp.down_proj"):
        same = torch.equal(*(m.parameter(f"model.layers.0.{linear}.weight") for m in (alike, weighed)))
        assert same == (linear.startswith("mlp") == (name == "heads"))
