"""A teacher that is not the recipe's baseline: opened by name, of the same tokens, part of every key."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from compress import artifact
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.plugin import step
from compress.steps.distill._network import Network
from compress.steps.distill._training import Ruler
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"tokens": 2048, "batch": 4, "checks": 2, "train": "all", "learning_rate": 1e-3}


def windows(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (32,), generator=generator) for _ in range(count)]


def unasked():
    raise AssertionError("the baseline was opened, though another teacher is named")


def context() -> Context:
    return Context(0, windows(64, 1), windows(4, 2), teacher=unasked, dismiss=unasked)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "other"
    artifact.save(tiny_model(seed=5), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("distill.logits", {}),
        ("distill.logits", {"top_k": 16}),
        ("distill.hidden", {}),
        ("distill.on_policy", {"prompt_tokens": 8, "new_tokens": 24}),
        ("distill.sequence", {"prompt_tokens": 8, "new_tokens": 24}),
    ],
)
def test_the_model_learns_from_the_teacher_that_is_named(teacher, name, fields):
    model, run = tiny_model(), context()

    def distance() -> float:
        ruler = Ruler("test", Network(tiny_model(seed=5).module, False), run.selection)
        return ruler.divergence(Network(model.module, False))

    before = distance()
    step(name)(teacher=str(teacher), **FAST, **fields).apply(model, run)
    assert f"{before:.4f} → " in run.notes[-1]
    assert distance() < before


def test_another_vocabulary_is_refused_before_weights_load(tmp_path):
    artifact.save(tiny_model(vocab_size=300), tmp_path / "large")
    with pytest.raises(RecipeError, match="the teacher has 300 tokens, the model 256"):
        step("distill.logits")(teacher=str(tmp_path / "large")).check(tiny_model().facts)
    with pytest.raises(RecipeError, match="no such file or folder"):
        step("distill.logits")(teacher=str(tmp_path / "absent")).check(tiny_model().facts)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    other = tiny_model()
    vocabulary = {f"word{i}": i for i in range(256)}
    other.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    )
    artifact.save(other, tmp_path / "words")
    with pytest.raises(RecipeError, match="has other tokens than the model"):
        step("distill.logits")(teacher=str(tmp_path / "words"), **FAST).apply(tiny_model(), context())


def test_results_hang_on_the_files_of_the_teacher(tmp_path):
    artifact.save(tiny_model(seed=1), tmp_path / "teacher")
    named = step("distill.logits")(teacher=str(tmp_path / "teacher"))
    before = named.reads()
    assert before and not step("distill.logits")().reads()
    artifact.save(tiny_model(seed=2), tmp_path / "second")
    (tmp_path / "second" / "model.safetensors").replace(tmp_path / "teacher" / "model.safetensors")
    assert named.reads() != before
