"""Labelled texts by the likelihood of label words: scores by hand, hostile files, and the gate over both."""

import copy
import json
import math
import random

import pytest
import torch
from pydantic import ValidationError

from compress import assay, plan
from compress.errors import RecipeError
from compress.gate import Gate
from compress.interfaces import Score
from compress.model import Model
from compress.numerics.divergence import token_nll
from evaluators.classification import Classification
from tests.tiny import WORDS, perturbed, tiny_model

LABELS = {"yes": " b", "no": " cd", "maybe": " c"}


def write(tmp_path, rows):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return f"file:{path}"


def make(data, **fields):
    return Classification(**{"data": data, "labels": LABELS, "max_drop": 10.0, **fields})


ROWS = [{"text": "one", "label": "yes"}, {"text": "two", "label": "no"}, {"text": "three", "label": "maybe"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["{"], ":1: expected a JSON object with a text"),
        ([{"text": "a"}], ":1: expected"),
        ([{"text": " ", "label": "yes"}], ":1: expected"),
        ([{"text": "a", "label": ["yes"]}], ":1: expected"),
        ([{"text": "a", "label": "Yes"}], "the label 'Yes' is none of labels: yes, no, maybe"),
        ([*ROWS, {"text": "one", "label": "no"}], ":4: repeats the text of line 1"),
        (ROWS[:2], "no row has the label 'maybe'"),
    ],
)
def test_a_file_that_cannot_work_is_refused_in_one_line(tmp_path, rows, message):
    with pytest.raises(RecipeError, match=message) as error:
        make(write(tmp_path, rows)).sources([])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"data": "wiki"}, {"labels": {"a": " b"}}, {"labels": {"a": " b", "c": " b"}}, {"labels": {"a": " b", "c": ""}},
     {"template": "Label:"}, {"template": "{text}{text}"}, {"max_drop": 0}, {"metric": "f1"}, {"max_documents": 49}],
)  # fmt: skip
def test_fields_that_would_decide_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        make(**{"data": "file:x", **fields})


def test_a_class_is_as_likely_as_its_words_after_the_text(tmp_path):
    model = tiny_model(0)
    check = make(write(tmp_path, ROWS), template="{text} is")
    (data,) = check.sources([])
    examples = check.examples(data, model.encode)
    for example, score in zip(examples, check.score(model, examples), strict=True):
        (row,) = [r for i, r in enumerate(ROWS, start=1) if str(i) == example.id]
        logs = []
        for words in LABELS.values():
            tokens, start = model.encode(f"{row['text']} is{words}"), len(model.encode(f"{row['text']} is "))
            rows = next(model.logits([tokens[:-1]]))
            logs.append(-float(token_nll(rows[start - 1 :], torch.tensor(tokens[start:])).sum()))
        want = torch.tensor(logs, dtype=torch.float64).softmax(0)
        place = list(LABELS).index(row["label"])
        assert score.positions == pytest.approx(want.tolist(), abs=1e-5)
        assert score.total == float(int(want.argmax()) != place)
        rank = 1 + sum(x > logs[place] for x in logs)
        assert check.model_copy(update={"metric": "mrr"}).score(model, [example])[0].total == 1 - 1 / rank
        brier = (want - torch.nn.functional.one_hot(torch.tensor(place), 3)).square().sum() / 2
        assert check.model_copy(update={"metric": "brier"}).score(model, [example])[0].total == pytest.approx(
            float(brier), abs=1e-5
        )


def test_a_tie_is_wrong_and_nan_stays(tmp_path):
    check = make("file:x")
    assert check._missing((0.4, 0.4, 0.2), 0) == 1 and check._missing((0.5, 0.3, 0.2), 0) == 0
    assert check.model_copy(update={"metric": "mrr"})._missing((0.4, 0.4, 0.2), 1) == 0.5
    model = tiny_model(0)
    with torch.no_grad():
        model.parameter("model.norm.weight")[0] = math.nan
    check = make(write(tmp_path, ROWS))
    assert all(math.isnan(s.total) for s in check.score(model, check.examples(check.sources([])[0], model.encode)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A file of texts whose labels are what the tiny model says, so that it is always right."""
    model, r = tiny_model(0), random.Random(0)
    texts = sorted({" ".join(r.choices(WORDS, k=4)) for _ in range(130)})
    folder = tmp_path_factory.mktemp("texts")
    two = {"b": " b", "q": " q"}
    check = Classification(
        data=write(folder, [{"text": t, "label": "bq"[i % 2]} for i, t in enumerate(texts)]), labels=two, max_drop=10.0
    )
    (data,) = check.sources([])
    scores = check.score(model, check.examples(data, model.encode))
    rows = [{"text": texts[int(s.id) - 1], "label": "bq"[s.positions[1] > s.positions[0]]} for s in scores]
    few = min(sum(row["label"] == label for row in rows) for label in "bq")
    assert few > 30
    kept = [row for label in "bq" for row in [r for r in rows if r["label"] == label][:few]]
    return model, check.model_copy(update={"data": write(folder, kept), "template": check.template})


def test_noise_fails_a_twin_passes_and_the_report_has_the_figures(learned):
    model, check = learned
    (found,) = Gate((check,)).evaluate(perturbed(model, 3.0), model, []).checks
    assert found.verdict == "FAIL" and found.reference == 1 and found.loss > 0.15
    details = found.details
    assert details["right to wrong"] == round(found.loss * found.examples) and details["wrong to right"] == 0
    assert details["reference's macro F1"] == details["reference's AUC-ROC"] == 1 > details["macro F1"]
    low, high = (details[f"change of macro F1, {x}"] for x in ("from (paired bootstrap, 95 %)", "to"))
    assert low < details["macro F1"] - 1 < high < 0
    assert found.samples[0].note.startswith("right: ") and {found.samples[0].reference, found.samples[0].model} == {
        "b",
        "q",
    }
    twin = Model(copy.deepcopy(model.module), model.tokenizer)
    (same,) = Gate((check,)).evaluate(twin, model, []).checks
    assert same.verdict == "PASS" and same.loss == 0 and same.details["change of AUC-ROC, to"] == 0


@pytest.mark.parametrize("metric", ["mrr", "brier"])
def test_other_metrics_decide_too(learned, metric):
    model, check = learned
    check = check.model_copy(update={"metric": metric, "max_drop": 1.0})
    (found,) = Gate((check,)).evaluate(perturbed(model, 10.0), model, []).checks
    assert found.verdict == "FAIL" and found.reference > found.value and found.source.endswith(f"by {metric}")
    assert check.untestable(check.sources([])[0])


def test_a_planted_loss_is_seen(learned):
    model, check = learned
    (found,) = assay.examine([check], model, [])[0]
    assert found.verdict == "SEEN", found


def test_a_reference_that_never_looks_at_the_text_proves_nothing():
    rows = [Score(str(i), float(i % 4 == 0), 1.0, {"label": float(i % 4 == 0)}) for i in range(60)]
    check = make("file:x", max_drop=5.0)
    assert "answer that never looks at the text, which earns 75.0" in check.doubt(rows, rows)
    assert check.model_copy(update={"metric": "mrr"})._constant(rows) == 0.75 + 0.25 / 2
    assert check.model_copy(update={"metric": "brier"})._constant(rows) == 1 - (1 - 0.75**2 - 0.25**2) / 2
    right = [Score(s.id, 0.0, 1.0, s.extra) for s in rows]
    assert check.doubt(rows, right) == ""


def test_plan_knows_the_power(learned):
    (power,) = plan._powers([learned[1]], 1, [])
    assert power["documents"] > 60 and power["margin_shown"] == "-10.00 points" and power["lossless"]
