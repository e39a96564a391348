"""Sparsity shared out among blocks, by outliers and by measured sensitivity."""

import pytest
import torch
from pydantic import ValidationError

from compress.interfaces import Context
from compress.model import Model
from compress.numerics.counts import pruned_count
from compress.plugin import step
from compress.steps.prune._allocation import outlier_shares, sensitivities
from tests.tiny import tiny_model

STEPS = ["prune.wanda", "prune.sparsegpt"]


def windows(count: int = 4, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def uneven() -> Model:
    """A tiny model whose second block hardly speaks, and has a few outliers."""
    model = tiny_model()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.parameter(f"model.layers.1.{name}.weight").data.mul_(0.01)
    model.parameter("model.layers.1.self_attn.q_proj.weight").data[:, :2] *= 30
    return model


def shares(model: Model) -> list[float]:
    """Sparsity of each block."""
    found = []
    for i in range(model.facts.layers):
        masks = [mask for name, mask in model.masks.items() if name.startswith(f"model.layers.{i}.")]
        found.append(sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks))
    return found


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("allocation", "protected"), [("owl", 1), ("sensitivity", 0)])
def test_what_matters_more_loses_less_and_the_total_stays(name, allocation, protected):
    model, context = uneven(), Context(seed=0, calibration=windows())
    step(name)(sparsity=0.5, allocation=allocation, spread=0.2).apply(model, context)
    found = shares(model)
    # counts per row of 32 or 64 weights are rounded down
    assert found[protected] == pytest.approx(0.3, abs=1 / 32)
    assert found[1 - protected] == pytest.approx(0.7, abs=1 / 32)
    assert any(f"sparsity per block by {allocation}: " in note for note in context.notes)


def test_own_targets_stand_above_the_allocation():
    model = uneven()
    fields = {"sparsity": 0.5, "allocation": "owl", "spread": 0.2, "layers": {"*.v_proj": 0.0, "*.o_proj": "2:4"}}
    step("prune.wanda")(**fields).apply(model, Context(seed=0, calibration=windows()))
    assert not any("v_proj" in name for name in model.masks)
    assert (model.masks["model.layers.0.self_attn.o_proj.weight"].view(-1, 4).sum(1) == 2).all()
    up = model.masks["model.layers.0.mlp.up_proj.weight"]
    assert ((~up).sum(dim=1) == pruned_count(0.7, 32)).all()


def test_measuring_leaves_the_weights_alone():
    model = uneven()
    digest = model.digest
    owl = outlier_shares(model, windows(), 5.0, lambda label, fraction: None)
    costs = sensitivities(model, windows(), 0.5, lambda label, fraction: None)
    model.touch()
    assert model.digest == digest
    assert owl[1] > owl[0] and costs[0] > costs[1]


def test_a_pattern_is_the_same_everywhere():
    with pytest.raises(ValidationError, match="allocation=owl with pattern=2:4"):
        step("prune.wanda")(pattern="2:4", allocation="owl")
    for fields in ({"spread": 0.0}, {"spread": 0.5}, {"outlier": 1.0}, {"allocation": "best"}):
        with pytest.raises(ValidationError):
            step("prune.wanda")(sparsity=0.5, **fields)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_nothing_to_prune_is_the_identity(allocation):
    model = tiny_model()
    step("prune.wanda")(sparsity=0.0, allocation=allocation).apply(model, Context(seed=0, calibration=windows()))
    assert model.digest == tiny_model().digest and not model.masks
