"""Toxicity of continuations: both kinds of scorer, hostile files, and the gate over flips."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, pipeline

from compress import plan
from compress.errors import Corrupt, RecipeError
from compress.gate import Gate
from compress.interfaces import Score
from compress.measure import evaluate
from compress.model import Model
from evaluators._toxicity_scorers import Classifier, Words
from evaluators.toxicity import Toxicity
from tests import tiny_gguf
from tests.evaluators.harness import no_network
from tests.evaluators.judges import letter_tokenizer, save_bert
from tests.evaluators.test_judges import edit

__all__ = ["no_network"]  # a fixture

TEXTS = ["you are kind", "you fool", "x", "A longer text, with 7 marks!"]


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return f"file:{path}"


# --- scorers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "kind"),
    [(("neutral", "toxic", "rude"), None), (("neutral", "toxic"), "single_label_classification"),
     (("threat", "toxic", "rude"), "multi_label_classification"), (("toxic",), None)],
)  # fmt: skip
def test_a_classifiers_scores_are_those_of_transformers_pipeline(tmp_path, labels, kind):
    folder = save_bert(tmp_path / "bert", labels, problem_type=kind)
    scorer = Classifier(classifier=str(folder), label="toxic")
    scorer.check()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    theirs = pipeline("text-classification", model=model, tokenizer=letter_tokenizer(), top_k=None, device="cpu")
    want = [next(row["score"] for row in rows if row["label"] == "toxic") for rows in theirs(TEXTS)]
    assert scorer.scores(TEXTS) == pytest.approx(want, abs=1e-6) and len(set(want)) == 4
    assert scorer.scores(TEXTS[::-1]) == scorer.scores(TEXTS)[::-1]


def test_a_classifier_that_cannot_work_is_refused(tmp_path):
    folder = save_bert(tmp_path / "bert", ("neutral", "toxic"))
    wrong = Classifier(classifier=str(folder), label="toxix")
    for look in (wrong.check, lambda: wrong.scores(["a"])):
        with pytest.raises(RecipeError, match=r"has no label 'toxix'; did you mean toxic\?"):
            look()
    edit(folder, lambda t: t["classifier.bias"].fill_(math.inf))
    assert math.isnan(Classifier(classifier=str(folder), label="toxic").scores(["a"])[0])
    odds = save_bert(tmp_path / "odds", ("toxic", "neutral"), problem_type="regression")
    with pytest.raises(RecipeError, match="is a regression"):
        Classifier(classifier=str(odds), label="toxic").scores(["a"])
    with pytest.raises(Corrupt, match="no classifier"):
        Classifier(classifier=str(save_bert(tmp_path / "encoder")), label="LABEL_0").scores(["a"])
    with pytest.raises(RecipeError, match="no such file or folder"):
        Classifier(classifier=f"{tmp_path}/none", label="toxic").check()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("You FOOL!", True),
        ("fool", True),
        ("foolish", False),
        ("tomfool", False),
        ("a  bad\nword.", True),  # a phrase, whatever the space
        ("bad words", False),
        ("don’t you dare", True),  # whatever the apostrophe
        ("STRASSE", True),  # as it is folded, ß is ss
        ("他是笨蛋吗", True),  # no spaces between words
        ("这fool人", True),
        ("", False),
    ],
)
def test_words_count_as_wholes(tmp_path, text, found):
    scorer = Words(words=write(tmp_path / "words.txt", ["fool", "", "Bad  Word", "don't you dare", "straße", "笨蛋"]))
    assert scorer.scores([text, "kind"]) == [float(found), 0.0]


def test_a_list_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="expected file:PATH"):
        Words(words="words.txt")
    with pytest.raises(RecipeError, match="cannot be read"):
        Words(words=f"file:{tmp_path}/none").check()
    with pytest.raises(RecipeError, match="is empty; expected a word"):
        Words(words=write(tmp_path / "empty.txt", ["", "  "])).check()
    (tmp_path / "bytes.txt").write_bytes(b"a\n\xff")
    with pytest.raises(Corrupt, match="not UTF-8 at byte 2"):
        Words(words=f"file:{tmp_path}/bytes.txt").check()


# --- the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["{"], ":1: expected a JSON object"),
        ([{"prompt": 1}], ":1: expected"),
        ([{"prompt": "a"}, {"prompt": " "}], ":2: expected"),
        ([{"prompt": "a"}, {"prompt": "a"}], ":2: repeats the prompt of line 1"),
        ([{"prompt": "a b"}, {"prompt": " a  b\n"}], ":2: repeats the prompt of line 1"),
    ],
)
def test_a_file_that_cannot_work_is_refused_in_one_line(tmp_path, rows, message):
    words = Words(words=write(tmp_path / "words.txt", ["fool"]))
    with pytest.raises(RecipeError, match=message) as error:
        Toxicity(data=write(tmp_path / "prompts.jsonl", rows), scorer=words, max_rise=3.0).sources([])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"data": "wiki"}, {"scorer": {}}, {"scorer": {"words": "file:w", "label": "toxic"}}, {"scorer": {"words": "w"}},
     {"scorer": {"classifier": "c"}}, {"scorer": {"classifier": "c", "label": "l", "threshold": 1.0}}, {"max_rise": 0},
     {"max_documents": 49}, {"max_new_tokens": 0}],
)  # fmt: skip
def test_fields_that_would_decide_nothing_are_refused(fields):
    good = {"data": "file:x", "scorer": {"words": "file:w"}, "max_rise": 3.0}
    Toxicity.model_validate_json(json.dumps(good))
    with pytest.raises(ValidationError):
        Toxicity.model_validate_json(json.dumps({**good, **fields}))


# --- the gate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline() -> Model:
    return tiny_gguf.tiny()


def headed(baseline, *rows: int) -> Model:
    """A model that writes one or the other of two tokens for ever; without any, the one that ends a text (0)."""
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    with torch.no_grad():
        weight = twin.parameter("lm_head.weight")
        row = weight[300].clone()
        weight.zero_()
        for token, sign in zip(rows, (1, -1)):
            weight[token] = sign * row
    twin.touch()
    return twin


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    rows = [{"prompt": f"the model {i} of a token is"} for i in range(90)]
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def texts(model, prompts):
    found = []
    for line in Path(prompts.removeprefix("file:")).read_text("utf-8").splitlines():
        written = model.generate(model.encode(json.loads(line)["prompt"]), 8)
        found.append(model.decode([t for t in written if t not in model.eos_ids]))
    return found


def test_flips_decide_and_are_shown(baseline, prompts, tmp_path):
    """Toxic is what the classifier says of half of the baseline's continuations, and of most of another model's."""
    folder = str(save_bert(tmp_path / "bert", ("neutral", "toxic")))
    other = tiny_gguf.tiny(seed=4)
    both = [texts(model, prompts) for model in (baseline, other)]
    means = {}
    for label in ("neutral", "toxic"):
        low, high = (Classifier(classifier=folder, label=label).scores(each) for each in both)
        means[sum(high) - sum(low)] = label, low, high
    label, low, high = means[max(means)]
    threshold = sorted(low)[60]
    newly = sum(a < threshold <= b for a, b in zip(low, high))
    no_longer = sum(b < threshold <= a for a, b in zip(low, high))
    scorer = Classifier(classifier=folder, label=label, threshold=threshold)
    fields = {"data": prompts, "scorer": scorer, "max_new_tokens": 8}
    assert newly > no_longer
    at_the_margin = Toxicity(max_rise=100 * (newly - no_longer) / 90, **fields)
    (found,) = Gate((at_the_margin,)).evaluate(other, baseline, []).checks
    assert found.examples == 90 and found.verdict == "INCONCLUSIVE"
    assert found.loss == pytest.approx((newly - no_longer) / 90) and found.reference == pytest.approx(30 / 90)
    assert (found.details["newly toxic"], found.details["no longer toxic"]) == (newly, no_longer)
    assert found.details["mean of the scorer"] == pytest.approx(sum(high) / 90, abs=1e-6)
    assert found.details["reference's mean of the scorer"] == pytest.approx(sum(low) / 90, abs=1e-6)
    assert found.samples[0].note == "newly toxic" and found.samples[0].prompt.startswith("the model")
    assert found.source == f"{prompts} by {label} of {folder} at {threshold:g}" and found.aspect == "safety"
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    (same,) = Gate((Toxicity(max_rise=3.0, **fields),)).evaluate(twin, baseline, []).checks
    assert same.verdict == "PASS" and same.loss == 0 and same.samples == []


def test_a_model_that_swears_fails_and_a_list_that_sees_nothing_proves_nothing(baseline, prompts, tmp_path):
    tokens = [t for t in range(300, 900) if len(baseline.decode([t]).strip()) > 3 and baseline.decode([t]).isalpha()]
    swears = headed(baseline, *tokens[:2])
    scorer = Words(words=write(tmp_path / "words.txt", sorted(set(texts(swears, prompts)))))
    check = Toxicity(data=prompts, scorer=scorer, max_rise=5.0, max_new_tokens=8)
    (found,) = Gate((check,)).evaluate(swears, baseline, []).checks
    assert found.verdict == "FAIL" and found.value == 1 and found.reference < 0.1 and found.loss > 0.9
    blind = check.model_copy(update={"scorer": Words(words=write(tmp_path / "other.txt", ["zzzzzz"]))})
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    (nothing,) = Gate((blind,)).evaluate(twin, baseline, []).checks
    assert nothing.verdict == "INVALID" and "no continuation of either model is toxic" in nothing.definition
    ones = [Score(str(i), 1.0, 1.0) for i in range(60)]
    assert check.doubt(ones, ones) == "the reference itself is toxic on 100%: no rise could be seen"


def test_an_empty_continuation_is_not_toxic_and_nan_is_nan(baseline, prompts, tmp_path):
    folder = str(save_bert(tmp_path / "bert", ("neutral", "toxic")))
    check = Toxicity(
        data=prompts,
        scorer=Classifier(classifier=folder, label="toxic", threshold=1e-6),
        max_rise=3.0,
        max_new_tokens=4,
    )
    (source,) = check.sources([])
    batch = check.examples(source, check.encoder(baseline))[:3]
    silent = headed(baseline)
    for score in check.score(silent, batch):
        assert (score.total, score.extra["toxicity"], score.extra["empty"], len(score.positions)) == (0, 0, 1, 1)
    assert all(score.total == 1 and score.extra["empty"] == 0 for score in check.score(baseline, batch))
    broken = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    with torch.no_grad():
        broken.parameter("model.norm.weight")[0] = math.nan
    assert all(math.isnan(score.total) for score in check.score(broken, batch))


def test_what_scores_is_part_of_the_cache_key_and_plan_asks_no_network(prompts, tmp_path, no_network):
    words = tmp_path / "words.txt"
    check = Toxicity(data=prompts, scorer=Words(words=write(words, ["fool"])), max_rise=3.0)
    (before,), read = check.sources([]), check.reads()
    write(words, ["fool", "idiot"])
    assert check.sources([])[0].digest != before.digest and check.reads() != read
    hub = check.model_copy(update={"scorer": Classifier(classifier="org/name", label="toxic")})
    hub.check()
    (power,) = plan._powers([hub], 1, [])
    assert power["documents"] == 90 and power["margin_shown"] == "+3.00 points"
    with pytest.raises(RecipeError, match="toxicity needs data, scorer"):
        evaluate("no/model", ["toxicity"])
