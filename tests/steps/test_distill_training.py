"""The descent of distillation: gradients of shadows and of recomputed blocks, lean moments, early ends."""

import pytest
import torch

from compress.errors import NumericalError
from compress.interfaces import Context
from compress.model import Model
from compress.plugin import step
from compress.steps.distill import _network as net
from compress.steps.distill._lessons import Reading
from compress.steps.distill.logits import Logits
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"tokens": 1024, "batch": 4, "checks": 2, "selection_tokens": 128, "alpha": 1.0}


def windows(count: int, seed: int, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def context(**fields) -> Context:
    data = {"calibration": windows(16, 1), "selection": windows(4, 2), "teacher": tiny_model, **fields}
    return Context(seed=0, **data)


def wounded(sparsity: float = 0.3) -> Model:
    model = tiny_model()
    step("prune.magnitude")(sparsity=sparsity).apply(model, Context(seed=0))
    model.touch()
    return model


def tied(model: Model) -> Model:
    model.module.config.tie_word_embeddings = True
    model.module.lm_head.weight = model.module.model.embed_tokens.weight
    return Model(model.module, model.tokenizer)


def gradients(model: Model, train: str, tmp_path, recompute: bool = False) -> dict[str, torch.Tensor]:
    """Of one step on three windows, by our networks."""
    teacher = Reading(net.Network(tiny_model().module, learns=False), 2.0, 0.5)
    with net.training(model, train, 4, 0, tmp_path) as parameters:
        student = net.Network(model.module, learns=True)
        if train == "lora":  # B begins at zero, where A has no gradient
            for i, parameter in enumerate(parameters.values()):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        if recompute:
            with net.recomputing(model, student):
                teacher.backward(student, windows(3, 5))
        else:
            teacher.backward(student, windows(3, 5))
        return {name: p.grad.clone() for name, p in parameters.items()}


@pytest.mark.parametrize("tie", [False, True])
def test_gradients_behind_shadows_are_those_of_plain_float32(tie, tmp_path):
    model, plain, teacher = wounded(), wounded(), tiny_model()
    if tie:
        model, plain = tied(model), tied(plain)
    found = gradients(model, "all", tmp_path)
    loss = torch.zeros(())
    positions = 0
    for window in windows(3, 5):
        logits = plain.module(window[None]).logits[0, :-1]
        with torch.no_grad():
            p = (teacher.module(window[None]).logits[0, :-1] / 2).log_softmax(-1)
        q = (logits / 2).log_softmax(-1)
        soft = 4 * (p.exp() * (p - q)).sum()
        loss = loss + 0.5 * soft + 0.5 * torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        positions += len(window) - 1
    (loss / positions).backward()
    expected = {name: p.grad for name, p in plain.module.named_parameters()}
    assert found.keys() == expected.keys() and len(found) == 20 + (not tie)
    for name, gradient in expected.items():
        # products in bfloat16 lose 2^-9 each, along two blocks and back, and steep softmaxes amplify it
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.parametrize("train", ["all", "norms", "lora"])
def test_recomputed_blocks_have_the_same_gradients_and_are_left_as_they_were(train, tmp_path):
    model = wounded()
    plain = gradients(wounded(), train, tmp_path)
    found = gradients(model, train, tmp_path, recompute=True)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name
    assert all("forward" not in vars(block) for block in model.module.model.layers)


def test_recomputing_keeps_fewer_activations(tmp_path):
    kept = []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = wounded()
        with net.training(model, "norms", 0, 0, tmp_path):
            student = net.Network(model.module, learns=True)
            weights = {t.untyped_storage().data_ptr() for t in (*student.frozen.values(), student.head_weight)}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                if recompute:
                    with net.recomputing(model, student):
                        student.hidden(windows(1, 0, 128)[0])
                else:
                    student.hidden(windows(1, 0, 128)[0])
        kept.append(sum(size for at, size in sizes.items() if at not in weights))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("fields", [{"moments": "bfloat16"}, {"gradient_checkpointing": True}])
def test_lean_settings_end_where_the_usual_ones_do(fields):
    found = []
    for own in ({}, fields):
        model, run = wounded(), context()
        Logits(train="all", learning_rate=3e-3, **FAST, **own).apply(model, run)
        found.append(float(run.notes[-1].split("→ ")[1].split(" ")[0]))
    start = float(run.notes[-1].split("baseline ")[1].split(" ")[0])
    assert found[1] == pytest.approx(found[0], abs=0.05 * (start - found[0])) and found[0] < 0.97 * start


def test_training_ends_after_checks_without_a_new_best():
    model, run = wounded(), context()
    fields = {**FAST, "tokens": 2048, "checks": 8, "learning_rate": 3.0, "patience": 2}
    Logits(train="norms", **fields).apply(model, run)
    assert "after step 0 of 16, stopped at 4" in run.notes[-1] and model.digest == wounded().digest


def test_what_a_failed_training_leaves_is_named(tmp_path):
    calls = 0

    def poison(module, args, output):
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 4 + 4 * 5 else output  # four selection windows, then five steps of four

    teacher = tiny_model()
    teacher.module.get_submodule("model.norm").register_forward_hook(poison)
    model = wounded()
    with pytest.raises(NumericalError, match=r"at step 6 of 8; .*the last good checkpoint, after step 4, stays in .*"):
        Logits(train="norms", save_steps=2, learning_rate=1e-2, **FAST).apply(
            model, context(teacher=lambda: teacher, work=tmp_path)
        )
    assert model.digest == wounded().digest and (tmp_path / "checkpoint.safetensors").is_file()
