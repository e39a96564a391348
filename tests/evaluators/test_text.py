"""Written answers against references: metrics equal to their libraries, hostile files, and the gate over both."""

import copy
import json
import re
import string
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from compress.errors import Corrupt, GateInconclusive, RecipeError
from compress.gate import Gate
from compress.measure import evaluate
from compress.model import Model
from evaluators import _text_metrics as metrics
from evaluators.text import Text
from tests import tiny_gguf

PAIRS = [
    ("the cat sat on the mat", ["the cat is on the mat", "there is a cat on the mat"]),
    ("A quick brown fox.", ["A quick, brown fox jumped.\nOver a dog."]),
    ("", ["something"]),
    ("something\nelse entirely", ["entirely\nsomething else"]),
    ("x", ["The x!"]),
]
WORDS = st.lists(st.sampled_from("the cat sat on a mat Paris 7 !".split()), max_size=8).map(" ".join)


# --- metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "references"), PAIRS)
def test_bleu_and_chrf_are_sacrebleus(answer, references):
    bleu = BLEU(effective_order=True).sentence_score(answer, references).score
    assert metrics.scorer("bleu")(answer, references) == min(1.0, bleu / 100)
    assert metrics.scorer("chrf")(answer, references) == CHRF().sentence_score(answer, references).score / 100


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize(("answer", "references"), PAIRS)
def test_rouge_is_that_of_rouge_score_with_the_best_reference(kind, answer, references):
    want = RougeScorer([kind]).score_multi(references, answer)[kind].fmeasure
    assert metrics.scorer(kind)(answer, references) == want


def test_bleu_of_chinese_needs_its_tokenizer():
    answer, references = "我喜欢红色的苹果", ["我喜欢绿色的苹果"]
    want = BLEU(effective_order=True, tokenize="zh").sentence_score(answer, references).score / 100
    assert metrics.scorer("bleu", "zh")(answer, references) == want > 0.3
    assert metrics.scorer("bleu")(answer, references) == 0


def squad(answer, reference):
    """SQuAD's evaluation as its text describes it, step by step: exact match and F1."""

    def normal(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    found, wanted = normal(answer).split(), normal(reference).split()
    same = sum((Counter(found) & Counter(wanted)).values())
    f1 = 0.0 if not same else 2 * (same / len(found)) * (same / len(wanted)) / (same / len(found) + same / len(wanted))
    return float(found == wanted), f1


@given(WORDS, WORDS)
def test_exact_match_and_f1_are_squads(answer, reference):
    em, f1 = squad(answer, reference)
    assert metrics.exact_match(answer, reference) == em
    assert metrics.f1(answer, reference) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "want"),
    [
        ("exact_match", "The Eiffel Tower!", "eiffel tower", 1.0),
        ("exact_match", "A tower", "Two towers", 0.0),
        ("f1", "in the city of Paris", "Paris, France", 2 * 1 / (4 + 2)),
        ("f1", "a a rose", "rose rose", 2 * 1 / (1 + 2)),  # articles leave, and a word counts as often as it is there
        ("f1", "巴黎在法国", "法国巴黎。", 2 * 4 / (5 + 4)),  # by characters, full stop left out
        ("exact_match", "《红楼梦》", "红楼梦", 1.0),
        ("f1", "2008年 Beijing", "在2008年", 2 * 2 / (3 + 3)),
        ("rougeS", "police killed the gunman", "police kill the gunman", 0.5),
        ("rougeS", "gunman the killed police", "police killed the gunman", 0.0),  # the order counts
        ("rougeS", "a b c d e f g", "a g", 0.0),  # five words between: too far apart
        ("rougeS", "a b c d e f", "a f", 2 * 1 / (15 + 1)),  # four: just near enough
        # METEOR: precision, recall and chunks by hand; stems match, synonyms do not.
        ("meteor_stem", "the cat sat", "the cat sat", 1 - 0.5 * (1 / 3) ** 3),
        ("meteor_stem", "cats sat", "The cat sat", (2 / 3) / (0.9 + 0.1 * 2 / 3) * (1 - 0.5 * (1 / 2) ** 3)),
        ("meteor_stem", "sat cat", "cat sat", 1 - 0.5 * 1),  # two chunks of two matches
        ("meteor_stem", "purchase it", "buy it", 0.5 * (1 - 0.5)),
    ],
)
def test_values_worked_out_by_hand(metric, answer, reference, want):
    assert metrics.scorer(metric)(answer, [reference]) == pytest.approx(want, abs=1e-12)
    assert metrics.scorer(metric)(answer, ["zzz yyy", reference]) == pytest.approx(want, abs=1e-12)


@given(WORDS, WORDS.filter(lambda w: len(re.findall("[a-z0-9]+", w.lower())) > 2), st.sampled_from(
    ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "rougeS", "exact_match", "f1", "meteor_stem"]
))  # fmt: skip
def test_a_metric_lies_between_nothing_and_a_perfect_answer(answer, reference, metric):
    score = metrics.scorer(metric)
    assert 0 <= score(answer, [reference]) <= 1
    perfect = score(reference, [reference])
    assert perfect == pytest.approx(1.0, abs=1e-12) or (metric == "meteor_stem" and 0.98 < perfect < 1)
    assert score("", [reference]) == 0


# --- the file ------------------------------------------------------------------------------------------------


def write(tmp_path, rows, name="qa.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return f"file:{path}"


GOOD = {"prompt": "Where?", "reference": "in Paris"}


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([], "f1", "is empty"),
        (["", "  "], "f1", "is empty"),
        (["{"], "f1", r':1: expected a JSON object with a text "prompt"'),
        (["[1]"], "f1", ":1: expected a JSON object"),
        ([GOOD, {"prompt": "q"}], "f1", ":2: expected"),
        ([{"reference": "a"}], "f1", ":1: expected"),
        ([{"prompt": "q", "references": []}], "f1", ":1: expected"),
        ([{"prompt": "q", "references": "text"}], "f1", ":1: expected"),
        ([{"prompt": "q", "reference": 7}], "f1", ":1: expected"),
        ([{"prompt": "q", "reference": " "}], "bleu", "none of them empty"),
        ([{"prompt": "q", "reference": "The!"}], "f1", "nothing is left of it"),
        ([{"prompt": "q", "reference": "巴黎"}], "rougeL", "ROUGE sees no word"),
        ([{"prompt": "q", "reference": "Paris"}], "rouge2", "pairs of words"),
        ([{"prompt": "q", "reference": "在巴黎"}], "meteor_stem", "no spaces between words"),
        ([{"prompt": "q", "reference": "Paris"}], "rougeS", "pairs of words"),
        ([{**GOOD, "id": 1}, {**GOOD, "prompt": "Who?", "id": "1"}], "f1", ":2: the id '1' occurs twice"),
        ([GOOD, GOOD], "f1", ":2: repeats the prompt of line 1"),
    ],
)
def test_a_file_that_cannot_work_is_refused_in_one_line(tmp_path, rows, metric, message):
    check = Text(data=write(tmp_path, rows), metric=metric, max_drop=3.0)
    with pytest.raises(RecipeError, match=message) as error:
        check.sources([])
    assert "\n" not in str(error.value) and "qa.jsonl" in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    for read in (lambda c: c.sources([]), lambda c: c.reads()):
        with pytest.raises(RecipeError, match="cannot be read"):
            read(Text(data=f"file:{tmp_path}/none.jsonl", metric="f1", max_drop=3.0))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(Corrupt, match="not UTF-8 at byte 0"):
        Text(data=f"file:{tmp_path}/bytes.jsonl", metric="f1", max_drop=3.0).sources([])


@pytest.mark.parametrize(
    "fields",
    [{"data": "wiki"}, {"metric": "meteor"}, {"wordnet": "wn"}, {"metric": "meteor_stem", "wordnet": "wn"},
     {"metric": "no"}, {"tokenize": "zh"}, {"until": [""]}, {"max_documents": 49},
     {"max_drop": 0}, {"max_drop": 51}, {"max_new_tokens": 0}],
)  # fmt: skip
def test_fields_that_would_decide_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        Text(**{"data": "file:x", "metric": "f1", "max_drop": 3.0, **fields})


def test_a_change_of_the_file_changes_what_is_cached(tmp_path):
    check = Text(data=write(tmp_path, [GOOD]), metric="bleu", max_drop=3.0)
    (before,), read = check.sources([]), check.reads()
    assert "sacrebleu 2" in read
    write(tmp_path, [{**GOOD, "reference": "in Rome"}])
    assert check.sources([])[0].digest != before.digest and check.reads() != read


def test_eval_says_that_it_needs_data():
    with pytest.raises(RecipeError, match="text needs data, metric"):
        evaluate("no/model", ["text"])


# --- the gate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline() -> Model:
    return tiny_gguf.tiny(max_position_embeddings=512)


@pytest.fixture(scope="module")
def wrecked(baseline) -> Model:
    """Answers with the same token for ever."""
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    with torch.no_grad():
        weight = twin.parameter("lm_head.weight")
        row = weight[300].clone()
        weight.zero_()
        weight[300], weight[301] = row, -row
    twin.touch()
    return twin


@pytest.fixture
def own_answers(baseline, tmp_path):
    """A file whose references are what the baseline answers, so that it earns everything."""
    rows = []
    for i in range(64):
        prompt = f"the model {i} is"
        written = baseline.generate(baseline.encode(prompt), 8)
        rows.append({"prompt": prompt, "reference": baseline.decode([t for t in written if t not in baseline.eos_ids])})
    return write(tmp_path, [row for row in rows if row["reference"].strip()])


def test_a_wrecked_model_fails_and_a_twin_passes(baseline, wrecked, own_answers):
    check = Text(data=own_answers, metric="chrf", max_drop=30.0, chat=False, max_new_tokens=8)
    (found,) = Gate((check,)).evaluate(wrecked, baseline, []).checks
    assert found.verdict == "FAIL" and found.reference > 0.99 and found.loss > 0.5
    assert found.details["worse answers"] > found.details["better answers"]
    assert found.samples[0].note.startswith("chrf 100 to ")
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    (same,) = Gate((check,)).evaluate(twin, baseline, []).checks
    assert same.verdict == "PASS" and same.loss == 0 and same.details["answers equal to the reference's"] == 1


def test_a_score_is_what_is_missing_of_the_answer_up_to_its_end(baseline, tmp_path):
    data = write(tmp_path, [{"prompt": "the model is", "references": ["of a weight", "scale"]}])
    check = Text(data=data, metric="chrf", max_drop=3.0, chat=False, max_new_tokens=8)
    (source,) = check.sources([])
    (example,) = check.examples(source, check.encoder(baseline))
    (score,) = check.score(baseline, [example])
    answer = baseline.generate(baseline.encode("the model is"), 8)
    assert score.positions == tuple(map(float, answer)) and score.weight == 1
    text = baseline.decode(answer)
    assert score.total == 1 - CHRF().sentence_score(text.strip(), ["of a weight", "scale"]).score / 100
    cut = check.model_copy(update={"until": (text.strip()[2],)})
    (short,) = cut.score(baseline, [example])
    before = text[: text.find(text.strip()[2])].strip()
    assert short.total == 1 - CHRF().sentence_score(before, ["of a weight", "scale"]).score / 100


def test_a_baseline_that_earns_nothing_proves_nothing(baseline, tmp_path):
    rows = [{"prompt": f"question {i}", "reference": "qqqq"} for i in range(60)]
    check = Text(data=write(tmp_path, rows), metric="exact_match", max_drop=50.0, chat=False, max_new_tokens=2)
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    (found,) = Gate((check,)).evaluate(twin, baseline, []).checks
    assert found.verdict == "INVALID" and "the reference itself earns 0.0 points" in found.definition


def test_too_few_rows_are_invalid_and_a_long_prompt_too(baseline, wrecked, tmp_path):
    check = Text(data=write(tmp_path, [GOOD]), metric="f1", max_drop=3.0, chat=False, max_new_tokens=2)
    (found,) = Gate((check,)).evaluate(wrecked, baseline, []).checks
    assert found.verdict == "INVALID" and "1 examples, and at least 50 are needed" in found.definition
    long = check.model_copy(update={"max_new_tokens": 600})
    (source,) = long.sources([])
    with pytest.raises(GateInconclusive, match="context holds 512"):
        long.score(baseline, long.examples(source, long.encoder(baseline)))


def test_logits_that_are_not_finite_give_nan(baseline, tmp_path):
    broken = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    with torch.no_grad():
        broken.parameter("model.norm.weight")[0] = float("nan")
    check = Text(data=write(tmp_path, [GOOD]), metric="f1", max_drop=3.0, chat=False, max_new_tokens=2)
    (source,) = check.sources([])
    (score,) = check.score(broken, check.examples(source, check.encoder(broken)))
    assert score.total != score.total
