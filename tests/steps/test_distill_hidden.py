"""Hidden-state matching: the loss against autograd, mapped blocks, projections between widths, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.products import working_products
from compress.numerics.relations import relation_divergence
from compress.plugin import step
from compress.steps.distill._lessons import Reading
from compress.steps.distill._network import Network
from compress.steps.distill._relations import Projected, Relating
from compress.steps.distill._states import Matching, States, fitted_projections, relative_error
from compress.steps.distill._training import Ruler
from compress.steps.distill.hidden import Hidden
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"tokens": 2048, "checks": 2, "learning_rate": 1e-2, "lora_rank": 4}
WOUNDS = {
    "weights": ("prune.magnitude", {"sparsity": 0.3}),
    "layers": ("prune.layers", {"count": 1}),
    "width": ("prune.hidden", {"fraction": 0.5, "round_to": 16}),
}


def windows(count: int, seed: int, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def context(teacher: Model | None = None, seed: int = 0, **fields) -> Context:
    teacher = teacher or tiny_model()
    data = {"calibration": windows(16, 1), "selection": windows(4, 2), **fields}
    return Context(seed=seed, teacher=lambda: teacher, **data)


def wounded(wound: str = "weights") -> Model:
    model = tiny_model()
    name, fields = WOUNDS[wound]
    step(name)(**fields).apply(model, context())
    model.touch()
    return model


def divergence(model: Model, run: Context) -> float:
    ruler = Ruler("test", Network(tiny_model().module, False), run.selection)
    return ruler.divergence(Network(model.module, False))


@settings(deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 10))
def test_the_relative_error_is_plain_and_has_no_unit(seed, factor):
    h, t = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)).double()
    plain = [sum((a - b) ** 2 for a, b in zip(x, y)) / sum(b * b for b in y) for x, y in zip(h.tolist(), t.tolist())]
    torch.testing.assert_close(relative_error(h, t), torch.tensor(plain).double())
    torch.testing.assert_close(relative_error(factor * h, factor * t), relative_error(h, t))
    assert not relative_error(t, t).any()
    assert relative_error(h, torch.zeros_like(t)).isfinite().all()


@pytest.mark.parametrize("wound", WOUNDS)
def test_training_heals_leaves_no_trace_and_says_who_learned_from_whom(wound):
    model, before, run = wounded(wound), wounded(wound), context()
    masks = {name: mask.clone() for name, mask in model.masks.items()}
    Hidden(**FAST).apply(model, run)
    assert divergence(model, run) < divergence(before, run)
    assert [(n, p.shape) for n, p in model.module.named_parameters()] == [
        (n, p.shape) for n, p in before.module.named_parameters()
    ]
    assert all(not model.parameter(name)[~mask].any() for name, mask in masks.items())
    assert all(not module._forward_hooks for module in model.module.modules())
    assert ("0 from 1" if wound == "layers" else "0 from 0, 1 from 1") in run.notes[-1]
    assert ("through 2 projections, now dropped" in run.notes[-1]) == (wound == "width")


@pytest.mark.parametrize("train", ["norms", "lora", "all"])
def test_runs_repeat_and_follow_the_seed(train):
    digests = []
    for seed in (0, 0, 1):
        model = wounded("width")
        Hidden(**{**FAST, "train": train, "learning_rate": 1e-3, "tokens": 512}).apply(model, context(seed=seed))
        digests.append(model.digest)
    assert digests[0] == digests[1] != digests[2]


def matching(student: Model, teacher: Model, weight: float, pairs: list[tuple[int, int]]) -> Matching:
    own, theirs = States(student, [s for s, _ in pairs]), States(teacher, [t for _, t in pairs])
    return Matching(Reading(Network(teacher.module, False), 2.0, 0.5), own, theirs, [], weight)


def test_value_and_gradient_are_those_of_whole_models_without_hooks():
    student, teacher, data, weight = wounded(), tiny_model(), windows(2, 3), 1e4
    lesson = matching(student, teacher, weight, [(0, 0)])
    network = Network(student.module, learns=True)
    reading = lesson.reading.backward(network, data)
    student.module.zero_grad()
    with lesson.own, lesson.theirs:
        total = lesson.backward(network, data)
    name = "model.layers.0.mlp.down_proj.weight"
    found = student.parameter(name).grad.clone()
    student.module.zero_grad()
    plain = torch.zeros(())
    for window in data:
        with working_products():
            stacks = [m.module(window[None], output_hidden_states=True).hidden_states for m in (student, teacher)]
        h, t = (stack[1][0, :-1].float() for stack in stacks)  # the embedding comes first
        plain = plain + weight * relative_error(h, t.detach()).sum() / 62
    plain.backward()
    assert total == pytest.approx(reading + float(plain.detach()), rel=1e-3) and total > 100 * reading
    expected = student.parameter(name).grad
    # bfloat16 products, and the small loss on the logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_the_error_is_the_mean_over_pairs_and_the_sum_over_scored_positions():
    lesson = matching(wounded(), tiny_model(), 1.0, [(0, 0), (0, 1), (1, 1)])
    h, t = torch.randn(2, 3, 9, 32, generator=torch.Generator().manual_seed(0))
    plain = sum(float(relative_error(a[i], b[i])) for a, b in zip(h, t) for i in range(8)) / 3
    assert float(lesson.error(list(h), list(t))) == pytest.approx(plain, rel=1e-5)
    with lesson.own, torch.no_grad():
        Network(wounded().module, False).hidden(windows(1, 0)[0])  # another model's states are not watched
        Network(lesson.own.model.module, False).hidden(windows(1, 0)[0])
        first, again, second = lesson.own.take()
    assert torch.equal(first, again) and not torch.equal(first, second) and first.shape == (32, 32)


def test_projections_start_as_the_least_squares_fit_and_learn():
    student, teacher, data = wounded("width"), tiny_model(), windows(6, 4)
    own, theirs = States(student, [0, 1]), States(teacher, [0, 1])
    networks = Network(student.module, False), Network(teacher.module, False)
    with own, theirs:
        found = fitted_projections("test", networks[0], own, networks[1], theirs, data)
        states = []
        for window in data:
            with torch.no_grad():
                networks[0].hidden(window), networks[1].hidden(window)
            states.append(list(zip(own.take(), theirs.take())))
    for i, P in enumerate(found.values()):
        assert P.shape == (32, student.facts.sizes["residual"]) and P.requires_grad
        h, t = (torch.cat([s[i][j] for s in states]).double() for j in (0, 1))
        size = t.norm(dim=1, keepdim=True)
        best = torch.linalg.lstsq(h / size, t / size).solution.T
        errors = [float(relative_error(h @ m.T, t).mean()) for m in (P.detach().double(), best)]
        assert errors[1] <= errors[0] <= 1.02 * errors[1] < 1  # the ridge costs little
    lesson = Matching(Reading(networks[1], 2.0, 0.5), own, theirs, list(found.values()), 1.0)
    with own, theirs:
        lesson.backward(Network(student.module, True), data)
    assert all(P.grad is not None and P.grad.any() for P in found.values())


def test_equal_states_add_nothing():
    student, teacher = tiny_model(), tiny_model()
    lesson = matching(student, teacher, 5.0, [(0, 0), (1, 1)])
    network = Network(student.module, learns=False)
    network.head_weight = network.head_weight.clone().requires_grad_()
    data = windows(2, 5)
    with lesson.own, lesson.theirs, torch.no_grad():
        network.hidden(data[0]), lesson.reading.teacher.hidden(data[0])
        assert float(lesson.error(lesson.own.take(), lesson.theirs.take())) == 0.0


@pytest.mark.parametrize(
    ("students", "teachers", "pairs"),
    [(2, 2, [(0, 0), (1, 1)]), (2, 6, [(0, 2), (1, 5)]), (3, 4, [(0, 0), (1, 1), (2, 3)]), (1, 30, [(0, 29)])],
)
def test_blocks_are_mapped_at_equal_shares_of_the_depth(students, teachers, pairs):
    from dataclasses import replace

    facts = tiny_model().facts
    assert Hidden().pairs(replace(facts, layers=students), replace(facts, layers=teachers)) == pairs


def test_blocks_that_do_not_exist_are_refused():
    facts = tiny_model().facts
    with pytest.raises(RecipeError, match="student's block 2, and it has 2, 0 to 1"):
        Hidden(layers=[[2, 0]]).check(facts)
    with pytest.raises(RecipeError, match="baseline's block 7, and it has 2, 0 to 1"):
        Hidden(layers=[[0, 7]], **FAST).apply(wounded(), context())
    assert Hidden(layers=[[1, 0], [1, 1]]).pairs(facts, facts) == [(1, 0), (1, 1)]
    for layers in ([], [[0]], [[0, -1]], [[0, 1, 2]]):
        with pytest.raises(ValidationError):
            Hidden(layers=layers)
    for fields in ({"weight": 0}, {"weight": math.nan}, {"projection_rate": -1.0}):
        with pytest.raises(ValidationError):
            Hidden(**fields)


def plain_relations(own: list[list[float]], theirs: list[list[float]], heads: int) -> list[float]:
    """Token by token and head by head, without tensors."""

    def relations(x: list[list[float]], head: int, i: int) -> list[float]:
        d = len(x[0]) // heads
        part = [row[head * d : (head + 1) * d] for row in x]
        scores = [sum(a * b for a, b in zip(part[i], part[j])) / math.sqrt(d) for j in range(i + 1)]
        weights = [math.exp(s - max(scores)) for s in scores]
        return [w / sum(weights) for w in weights]

    found = []
    for i in range(len(own)):
        pairs = [(relations(theirs, h, i), relations(own, h, i)) for h in range(heads)]
        found.append(sum(sum(p * math.log(p / q) for p, q in zip(*pair)) for pair in pairs) / heads)
    return found


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 2, 4]))
def test_relations_are_compared_as_a_plain_version_does(seed, heads):
    generator = torch.Generator().manual_seed(seed)
    own, theirs = (torch.randn(6, width, generator=generator).double() for width in (8, 12))
    found = relation_divergence(own, theirs, heads)
    torch.testing.assert_close(found, torch.tensor(plain_relations(own.tolist(), theirs.tolist(), heads)).double())
    assert not relation_divergence(theirs, theirs, heads).any() and found[0] == 0  # the first looks at itself alone


@pytest.mark.parametrize("wound", ["weights", "width"])
def test_relations_learn_beside_the_states_and_have_a_gradient_of_their_own(wound):
    model, run = wounded(wound), context()
    Hidden(relations=1.0, gradient_checkpointing=True, **FAST).apply(model, run)
    assert divergence(model, run) < divergence(wounded(wound), run)
    assert all(not module._forward_hooks for module in model.module.modules())
    student, teacher = wounded(wound), tiny_model()
    own, theirs = Projected(student, [1]), Projected(teacher, [1])
    with own, theirs:
        networks = Network(student.module, True), Network(teacher.module, False)
        networks[0].hidden(windows(1, 3)[0])
        with torch.no_grad():
            networks[1].hidden(windows(1, 3)[0])
        error = Relating(own, theirs, 2, 3.0).error()
    error.backward()
    assert float(error.detach()) > 0 and student.parameter("model.layers.0.mlp.up_proj.weight").grad.any()
    gradient = student.parameter("model.layers.1.self_attn.k_proj.weight").grad
    assert gradient.any() and student.parameter("model.layers.1.self_attn.o_proj.weight").grad is None


def test_relation_heads_that_do_not_divide_are_refused():
    with pytest.raises(RecipeError, match="relation_heads=3 does not divide the 32 channels of the model's q_proj"):
        Hidden(relations=1.0, relation_heads=3, **FAST).apply(wounded(), context())


def test_a_non_finite_state_names_the_step_and_keeps_the_weights():
    model, before, teacher, at_work = wounded(), wounded(), tiny_model(), []
    run = context(teacher, progress=lambda label, _: at_work.append(label))

    def poison(module, args, output):
        return output * math.nan if len(at_work) == 2 else output

    teacher.module.get_submodule("model.layers.0").register_forward_hook(poison)
    with pytest.raises(NumericalError, match=r"distill\.hidden: loss nan.* at step 3 of 16"):
        Hidden(**{**FAST, "checks": 1}).apply(model, run)
    assert model.digest == before.digest and all(not m._forward_hooks for m in model.module.modules())
    with pytest.raises(RecipeError, match="needs a baseline"):
        Hidden(**FAST).apply(model, context(calibration=()))
