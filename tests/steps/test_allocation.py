"""Sparsity shared out among blocks, by outliers and by measured sensitivity."""

import math
from fnmatch import fnmatchcase

import pytest
import torch
from pydantic import ValidationError

from compress.blocks import Block
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.counts import pruned_count
from compress.numerics.divergence import divergence
from compress.numerics.masks import keep_highest
from compress.plugin import step
from compress.steps.prune._allocation import Part, outlier_shares, parts, sensitivities
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
    wanda = step("prune.wanda")(sparsity=0.5)
    among = parts(model, [f"{name}.weight" for name in model.facts.linears], wanda.set_size)

    def masks(block: Block, _: Part) -> dict[str, torch.Tensor]:
        return {name: keep_highest(scores, 0.5) for name, scores in wanda.scores(block).items()}

    owl = outlier_shares(model, windows(), among, 5.0, lambda label, fraction: None)
    costs = sensitivities(model, windows(), among, masks, lambda label, fraction: None)
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


ALL = ["prune.magnitude", *STEPS]
OWN = {"*.mlp.*": 0.0, "model.layers.0.self_attn.q_proj": 0.25, "*.down_proj": "2:4"}


def sharing(model: Model, layers: dict) -> list[str]:
    """Tensors that no glob of `layers` names."""
    return [f"{m}.weight" for m in model.facts.linears if not any(fnmatchcase(m, glob) for glob in layers)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
@pytest.mark.parametrize("layers", [{}, OWN, {"model.layers.0.*": 0.0}, {"model.layers.1.mlp.*": 0.7}])
def test_what_takes_part_loses_the_sparsity_to_less_than_one_weight_per_compared_set(name, allocation, layers):
    model, context = uneven(), Context(seed=0, calibration=windows())
    made = step(name)(sparsity=0.47, allocation=allocation, layers=layers)
    made.apply(model, context)
    tensors = sharing(model, layers)
    lost = sum(int((~model.masks[t]).sum()) for t in tensors)
    weights = sum(model.masks[t].numel() for t in tensors)
    sets = sum(n * m // made.set_size(n, m) for n, m in (model.masks[t].shape for t in tensors))
    assert pruned_count(0.47, weights) - sets < lost <= pruned_count(0.47, weights)
    assert any(
        f"in all {lost} of the {weights} weights that share it ({lost / weights:.2%})" in n for n in context.notes
    )
    for tensor, target in made.own_targets(model.facts).items():
        if isinstance(target, tuple):
            assert (model.masks[tensor].view(-1, 4).sum(1) == 2).all()
        elif target == 0:
            assert tensor not in model.masks
        else:
            size = made.set_size(*model.masks[tensor].shape)
            assert ((~model.masks[tensor]).view(-1, size).sum(1) == pruned_count(target, size)).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_what_was_pruned_before_counts_towards_the_total(name, allocation):
    """Block 0 has lost three quarters of a few matrices already, unevenly: the rest loses less than it would."""
    model, context = uneven(), Context(seed=0, calibration=windows())
    earlier = {"*": 0.0, "model.layers.0.mlp.*": 0.75}
    step("prune.magnitude")(sparsity=0.1, layers=earlier).apply(model, context)
    old = {tensor: mask.clone() for tensor, mask in model.masks.items()}
    made = step(name)(sparsity=0.5, allocation=allocation)
    made.apply(model, context)
    masks = model.masks
    assert all(not (masks[tensor] & ~mask).any() for tensor, mask in old.items())
    lost, weights = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    sets = sum(n * m // made.set_size(n, m) for n, m in (m.shape for m in masks.values()))
    assert pruned_count(0.5, weights) - sets < lost <= pruned_count(0.5, weights)


@pytest.mark.parametrize("name", ALL)
def test_sensitivity_is_what_the_step_costs_on_one_block(name):
    """Against the step itself with all else exempt, on whole forward passes, after an earlier step."""
    calibration, layers = windows(), {"*.up_proj": 0.0, "*.o_proj": "2:4", "model.layers.1.self_attn.*": 0.3}
    before = {"*": 0.0, "model.layers.1.mlp.*": 0.2}

    def fresh() -> Model:
        model = uneven()
        step("prune.magnitude")(sparsity=0.1, layers=before).apply(model, Context(seed=0))
        return model

    ids, expected = [window.tolist() for window in calibration], []
    for block in range(2):
        proxy = "prune.wanda" if name == "prune.sparsegpt" else name  # which measures without its update
        exempt = [glob.replace("*.", f"model.layers.{block}.*.") for glob in layers] + [f"model.layers.{1 - block}.*"]
        model = fresh()
        step(proxy)(sparsity=0.4, layers=dict.fromkeys(exempt, 0.0)).apply(model, Context(0, calibration))
        total = sum(float(divergence(p, q).kl.sum()) for p, q in zip(fresh().logits(ids), model.logits(ids)))
        sizes = [model.parameter(t).numel() for t in sharing(model, layers) if f".{block}." in t]
        expected.append(math.log(total / sum(map(len, calibration)) / sum(sizes)))
    made, model = step(name)(sparsity=0.5, allocation="sensitivity", layers=layers), fresh()
    found = made.worth(model, Context(0, calibration), parts(model, sharing(model, layers), made.set_size), 0.4)
    assert found == pytest.approx(expected, abs=0.02)  # bfloat16 products in batches of another shape round otherwise


def test_magnitude_reads_calibration_only_where_blocks_are_compared():
    magnitude = step("prune.magnitude")
    assert not magnitude(sparsity=0.5).uses_calibration and not magnitude(pattern="2:4").uses_calibration
    for allocation in ("owl", "sensitivity"):
        made = magnitude(sparsity=0.5, allocation=allocation)
        assert made.uses_calibration
        model = uneven()
        with pytest.raises(RecipeError, match="prune.magnitude needs calibration data"):
            made.apply(model, Context(seed=0))
        assert not model.masks
        with pytest.raises(ValidationError, match=f"scope=global with allocation={allocation}"):
            magnitude(sparsity=0.5, allocation=allocation, scope="global")


@pytest.mark.parametrize("name", ALL)
def test_an_allocation_without_weights_to_share_it_is_refused_before_they_load(name):
    facts = tiny_model().facts
    with pytest.raises(RecipeError, match="allocation=owl, but layers names every linear"):
        step(name)(sparsity=0.5, allocation="owl", layers={"*": 0.3}).check(facts)
    with pytest.raises(ValidationError, match="allocation=sensitivity with pattern=4:8"):
        step(name)(pattern="4:8", allocation="sensitivity")
