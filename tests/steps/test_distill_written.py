"""Distillation on sequences that a model writes: the sampler, the teacher's sequences and the student's own."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context
from compress.model import Model
from compress.numerics.masks import keep_highest
from compress.numerics.products import working_products
from compress.steps.distill._lessons import Reading, Text, Writing, set_aside
from compress.steps.distill._network import Network
from compress.steps.distill._sampling import choose, write
from compress.steps.distill._training import Ruler
from compress.steps.distill.on_policy import OnPolicy
from compress.steps.distill.sequence import Sequence
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"tokens": 2048, "checks": 2, "learning_rate": 1e-2, "prompt_tokens": 8, "new_tokens": 24, "lora_rank": 4}
STEPS = [Sequence, OnPolicy]


def windows(count: int, seed: int, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def context(teacher: Model | None = None, seed: int = 0, **fields) -> Context:
    teacher = teacher or tiny_model()
    data = {"calibration": windows(64, 1), "selection": windows(4, 2), **fields}
    return Context(seed=seed, teacher=lambda: teacher, **data)


def wounded(sparsity: float = 0.3) -> Model:
    model = tiny_model()
    for module in model.facts.linears:
        weight = model.parameter(f"{module}.weight").data
        model.masks[f"{module}.weight"] = mask = keep_highest(weight.abs(), sparsity)
        weight.masked_fill_(~mask, 0.0)
    model.touch()
    return model


def sharp(model: Model, factor: float = 4.0) -> Model:
    """Predictions so certain that what is written tells of the model."""
    with torch.no_grad():
        model.parameter("lm_head.weight").mul_(factor)
    model.touch()
    return model


def divergence(model: Model, data: list[torch.Tensor], teacher: Model) -> float:
    return Ruler("test", Network(teacher.module, False), data).divergence(Network(model.module, False))


# --- the sampler ------------------------------------------------------------------------------------------


def test_greedy_writing_through_the_cache_follows_whole_forward_passes():
    network = Network(tiny_model().module, learns=False)
    prompts, read = windows(5, 3, length=6), []
    hook = network.body.embed_tokens.register_forward_hook(lambda module, ids, out: read.append(tuple(ids[0].shape)))
    texts = write(network, prompts, 20, 0.0, (), torch.Generator())
    hook.remove()
    assert read == [(5, 6), *[(5, 1)] * 19]  # all rows at once, each token once
    for text, prompt in zip(texts, prompts):
        assert torch.equal(text[:6], prompt) and len(text) == 26
        with torch.no_grad():
            logits = network.head(network.hidden(text)).float()[5:-1]
        chosen = logits.gather(1, text[6:, None])[:, 0]
        # products are rounded to bfloat16 in another order: logits of about 6 differ by some 2^-5
        assert (logits.amax(1) - chosen <= 0.15).all()
        assert (logits.argmax(1) == text[6:]).float().mean() > 0.8


def test_a_row_that_ends_leaves_and_the_others_write_on_as_they_would_without_it():
    network = Network(tiny_model().module, learns=False)
    prompts = windows(6, 4, length=6)
    free = write(network, prompts, 12, 0.0, (), torch.Generator())
    end = int(free[2][9])  # what row 2 writes fourth
    ended = write(network, prompts, 12, 0.0, {end}, torch.Generator())
    stops = [text[6:].tolist().index(end) + 7 if end in text[6:].tolist() else 18 for text in free]
    assert [len(text) for text in ended] == stops and min(stops) <= 10
    for text, whole, stop in zip(ended, free, stops):
        assert torch.equal(text, whole[:stop])
    assert all(len(t) == 7 for t in write(network, prompts, 12, 0.0, range(256), torch.Generator()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    drawn = choose(logits.expand(20000, 4), temperature, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20000
    # 4 standard deviations of a share of one half
    torch.testing.assert_close(share, (logits / temperature).softmax(0), rtol=0, atol=4 * math.sqrt(0.25 / 20000))
    assert choose(logits.expand(3, 4), 0.0, torch.Generator()).tolist() == [3, 3, 3]


def test_writing_follows_the_seed_and_leaves_the_weights_trainable():
    model = tiny_model()
    network = Network(model.module, learns=True)
    texts = [write(network, windows(3, 5), 8, 1.0, (), torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert all(map(torch.equal, texts[0], texts[1])) and not all(map(torch.equal, texts[0], texts[2]))
    # a weight that autocast had converted without a graph must not serve the training that follows
    Text(8).backward(network, texts[0])
    assert all(p.grad is not None and p.grad.any() for p in model.module.parameters())


def test_non_finite_logits_are_refused():
    with pytest.raises(NumericalError, match="not finite"):
        choose(torch.tensor([[0.0, math.nan]]), 1.0, torch.Generator())


# --- lessons ----------------------------------------------------------------------------------------------


def test_only_what_was_written_is_scored():
    model = tiny_model()
    network, data, given = Network(model.module, learns=True), windows(3, 6), 8
    loss = Text(given).backward(network, data)
    found = model.parameter("lm_head.weight").grad.clone()
    model.module.zero_grad()
    with working_products():
        logits = model.module(torch.stack(data)).logits[:, given - 1 : -1].float()
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack(data)[:, given:].flatten())
    plain.backward()
    assert loss == pytest.approx(float(plain.detach()), rel=1e-3)  # bfloat16 logits, summed in float64
    expected = model.parameter("lm_head.weight").grad
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_decides_who_wrote(share):
    network = Network(tiny_model().module, learns=True)
    reading = Reading(Network(tiny_model(1).module, learns=False), 1.0, 1.0, "reverse", 8)
    lesson = Writing(reading, "test", share, 1.0, frozenset(), torch.Generator().manual_seed(0))
    for _ in range(40):
        lesson.backward(network, [window[:10] for window in windows(2, 7)])
    assert lesson.own + lesson.others == 40 and lesson.written == 4 * lesson.own
    assert abs(lesson.own - 40 * share) <= 4 * math.sqrt(40 * share * (1 - share))


def test_without_own_sequences_it_is_the_reading_itself():
    network = Network(tiny_model().module, learns=False)
    reading = Reading(Network(tiny_model(1).module, learns=False), 1.0, 1.0, "js", 8)
    lesson = Writing(reading, "test", 0.0, 1.0, frozenset(), torch.Generator().manual_seed(0))
    network.head_weight = network.head_weight.clone().requires_grad_()
    assert lesson.backward(network, windows(2, 8)) == reading.backward(network, windows(2, 8)) > 0


def read_by(model: Model) -> list[list[int]]:
    """A list that grows by every window that the model reads whole, from now on."""
    seen: list[list[int]] = []
    model.module.model.embed_tokens.register_forward_hook(lambda module, ids, out: seen.extend(ids[0].tolist()))
    return seen


def test_the_teacher_reads_what_the_student_wrote():
    student, teacher, prompts = tiny_model(1), tiny_model(), windows(3, 9)
    network = Network(student.module, learns=True)
    expected = write(network, [w[:8] for w in prompts], 24, 0.0, (), torch.Generator())
    seen = read_by(teacher)
    reading = Reading(Network(teacher.module, learns=False), 1.0, 1.0, "reverse", 8)
    Writing(reading, "test", 1.0, 0.0, frozenset(), torch.Generator()).backward(network, prompts)
    assert seen == [text.tolist() for text in expected]


def test_the_student_reads_what_the_teacher_wrote():
    student, teacher, run = wounded(), tiny_model(1), context(tiny_model(1), selection=windows(1, 2, length=31))
    seen = read_by(student)
    Sequence(**{**FAST, "sampling_temperature": 0.0, "tokens": 256}).apply(student, run)
    prompts = {tuple(w[:8].tolist()) for w in run.calibration}
    texts = [torch.tensor(t) for t in seen if len(t) == 32]  # the selection's window is shorter
    assert len(texts) == 8 and all(tuple(t[:8].tolist()) in prompts for t in texts)
    network = Network(teacher.module, learns=False)
    for text in texts:
        with torch.no_grad():
            logits = network.head(network.hidden(text)).float()[7:-1]
        assert (logits.amax(1) - logits.gather(1, text[8:, None])[:, 0] <= 0.15).all()  # see above


def test_tied_weights_come_back_from_their_file():
    config = tiny_model().module.config.to_dict() | {"tie_word_embeddings": True}
    module = LlamaForCausalLM(LlamaConfig(**config))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), set_aside(module):
        assert all(not p.numel() for p in module.parameters())
        raise KeyboardInterrupt
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- the steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["norms", "lora", "all"])
@pytest.mark.parametrize("kind", STEPS)
def test_training_heals_and_keeps_zeros(kind, train):
    teacher, model, before = tiny_model(), wounded(), wounded()
    if kind is Sequence:  # single tokens tell little of a flat distribution
        sharp(teacher), sharp(model), sharp(before)
    kept = {name: mask.clone() for name, mask in model.masks.items()}
    run = context(teacher)
    fields = {**FAST, "train": train, "learning_rate": {"norms": 1e-2, "lora": 3e-3, "all": 1e-3}[train]}
    kind(**fields).apply(model, run)
    assert divergence(model, run.selection, teacher) < divergence(before, run.selection, teacher)
    for name, mask in kept.items():
        assert torch.equal(model.masks[name], mask) and not model.parameter(name)[~mask].any()
    assert "KL to the baseline" in run.notes[-1] and "tokens" in run.notes[-1]
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("kind", STEPS)
def test_runs_repeat_and_follow_the_seed(kind):
    digests = []
    for seed in (0, 0, 1):
        model = sharp(wounded())
        kind(**FAST).apply(model, context(sharp(tiny_model()), seed))
        digests.append(model.digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_teacher_has_written_everything_and_is_gone_before_training():
    model, heard = wounded(), []

    def dismiss() -> None:
        assert not any(label.startswith("step") for label in heard)
        assert all(not p.numel() for p in model.module.parameters())
        teacher.close()

    teacher = tiny_model()
    run = context(teacher, dismiss=dismiss, progress=lambda label, _: heard.append(label))
    Sequence(**FAST).apply(model, run)
    assert heard[1] == "the baseline wrote sequence 64/64" and heard[-1].startswith("step")
    assert "the baseline wrote 1536 tokens in 64 sequences" in run.notes[-1]


@pytest.mark.parametrize("kind", STEPS)
def test_a_non_finite_loss_names_the_step_and_keeps_the_weights(kind):
    model, before, teacher, at_work = wounded(), wounded(), tiny_model(), []
    run = context(teacher, progress=lambda label, _: at_work.append(label) if label.startswith("step") else None)
    watched = model if kind is Sequence else teacher

    def poison(module, args, output):
        return output * math.nan if len(at_work) == 2 else output

    hook = watched.module.get_submodule("model.norm").register_forward_hook(poison)
    with pytest.raises(NumericalError, match=rf"{kind.name}: .*nan.* at step 3 of"):
        kind(**{**FAST, "checks": 1}).apply(model, run)
    hook.remove()
    assert model.digest == before.digest


def test_a_student_or_teacher_that_writes_nonsense_is_named():
    broken = copy.deepcopy(tiny_model().module)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    nonsense = Model(broken, tiny_model().tokenizer)
    lesson = Writing(
        Reading(Network(tiny_model().module, False), 1.0, 1.0, "js", 8), "distill.on_policy", 1.0, 1.0, frozenset(),
        torch.Generator(),
    )  # fmt: skip
    with pytest.raises(NumericalError, match="distill.on_policy: the logits .* at step 1"):
        lesson.backward(Network(broken, True), windows(1, 0))
    with pytest.raises(NumericalError, match=r"distill\.sequence"):
        Sequence(**FAST).apply(tiny_model(), context(nonsense))


@pytest.mark.parametrize("kind", STEPS)
def test_what_cannot_work_is_refused_in_one_line(kind):
    facts = tiny_model().facts
    with pytest.raises(RecipeError, match="prompt_tokens=100 and new_tokens=29 make 129, and the model holds 128"):
        kind(prompt_tokens=100, new_tokens=29).check(facts)
    with pytest.raises(RecipeError, match="tokens=32 are used up by one prompt of 32"):
        kind(tokens=32, prompt_tokens=32).check(facts)
    before = tiny_model().digest
    for short, empty in ((windows(3, 0, length=7), "of 3 calibration windows"), ((), "needs a baseline")):
        model = tiny_model()
        with pytest.raises(RecipeError, match=empty):
            kind(**FAST).apply(model, context(calibration=short))
        assert model.digest == before
    for fields in ({"new_tokens": 0}, {"prompt_tokens": 0}, {"sampling_temperature": -1.0}):
        with pytest.raises(ValidationError):
            kind(**fields)
    with pytest.raises(ValidationError):
        OnPolicy(student_share=1.5)
