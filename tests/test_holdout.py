"""The sealed holdout: split, ledger, and the one look of a final model."""

import json

import pytest

from compress import data, holdout, recipe, run
from compress.data import Request, split
from compress.decisions import PLANNED, skewness
from compress.errors import Corrupt, RecipeError
from compress.interfaces import Documents
from compress.numerics.sequences import mixture_variance, width
from compress.plan import describe, evaluation, requests
from compress.report import render_html, render_markdown, summary_lines
from compress.source import facts, resolve
from compress.store import Store
from compress.workbench import Reporter
from tests.test_run import INT4, INT8, RECIPE, place  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
HELD = Documents("wiki", [("a", "text")], "digest", 512)


def load(place, step, held=True, release=None):  # noqa: F811
    text = RECIPE.format(model=place / "model", text=place / "text.jsonl", steps=f"[{{{step}}}]", export="[]")
    if held:
        text = text.replace(
            "release:", f'  holdout: {{source: "file:{place / "text.jsonl"}", length: 64}}\nrelease:', 1
        )
    if release:
        text = text.replace("[{perplexity: {max_increase: 5%}}, {divergence: {max_mean: 0.02}}]", release, 1)
    return recipe.load(text)


def test_the_holdout_is_apart_from_all_else_and_costs_nothing_where_it_is_not_asked(tmp_path):
    path = tmp_path / "text.jsonl"
    texts = [" ".join(f"w{(i * 37 + j * j) % 991}" for j in range(30)) for i in range(400)]
    texts[1::10] = texts[0::10]  # each tenth document occurs twice, under another id
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    roles = ("calibration", "selection", "evaluation")
    requests = [Request(role, f"file:{path}") for role in roles]
    without, parts = split(requests, 0), split([*requests, Request("holdout", f"file:{path}")], 0)
    assert [p.request.role for p in parts] == [*roles, "holdout"]
    ids = [d.id for p in parts for d in p.documents]
    assert len(ids) == len(set(ids)) and len(parts[3].documents) > 40
    grams = {p.request.role: set().union(*(data._ngrams(d.text) for d in p.documents)) for p in parts}
    assert not grams["holdout"] & (grams["evaluation"] | grams["calibration"] | grams["selection"])
    assert parts[3].dropped  # what repeats an evaluation document
    assert [p.digest for p in split(requests, 0)] == [p.digest for p in without]


def test_a_holdout_in_another_source_must_not_repeat_the_evaluation(tmp_path):
    words = " ".join(f"w{i}" for i in range(20))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": words}) + "\n")
    a, b = (f"file:{tmp_path / f'{name}.jsonl'}" for name in "ab")
    with pytest.raises(RecipeError, match="holdout source .* repeats 13 words of evaluation source"):
        split([Request("evaluation", a), Request("holdout", b)], 0)


def test_each_model_is_put_on_record_once(tmp_path):
    store = Store(tmp_path)
    assert holdout.spend(store, "base", HELD, "m1", "first") == (1, [])
    assert holdout.spend(store, "base", HELD, "m2", "second") == (2, ["first"])
    assert holdout.spend(store, "base", HELD, "m1", "first") == (1, [])  # the same model again learns nothing new
    assert holdout.spend(Store(tmp_path), "base", HELD, "m3", "second") == (3, ["first", "second"])
    other = Documents("wiki", [("a", "another text")], "digest", 512)
    assert holdout.spend(store, "base", other, "m3", "second") == (1, [])
    assert holdout.spend(store, "another baseline", HELD, "m3", "second") == (1, [])


def test_the_same_texts_are_no_fresh_holdout_whatever_they_are_called(tmp_path):
    store, texts = Store(tmp_path), [("a", "one"), ("b", "two")]
    holdout.spend(store, "base", Documents("wiki", texts, "digest", 512), "m1", "first")
    for i, again in enumerate(
        (
            Documents("wiki", texts, "of another length of windows", 256),
            Documents("wiki", texts[::-1], "in another order", 512),
            Documents("file:copy.jsonl", texts, "elsewhere", 512),
        )
    ):
        assert holdout.spend(store, "base", again, f"m{i + 2}", "next")[0] == i + 2


def test_a_damaged_record_is_no_fresh_holdout(tmp_path):
    store = Store(tmp_path)
    holdout.spend(store, "base", HELD, "m1", "first")
    (record,) = (store.root / "records").rglob("*.json")
    record.write_text(record.read_text().replace("m1", "m0"))
    for _ in range(2):  # it stays where it is
        with pytest.raises(Corrupt, match="who has seen this holdout cannot be told any more: take other documents"):
            holdout.spend(store, "base", HELD, "m2", "second")
    record.unlink()
    assert holdout.spend(store, "base", HELD, "m2", "second") == (1, [])


def test_all_uses_together_keep_the_error(tmp_path):
    shares = [1 / holdout.attempts(k) for k in range(1, 10_000)]
    assert shares[0] == 0.5 and shares == sorted(shares, reverse=True) and 0.999 < sum(shares) <= 1


def test_only_checks_that_read_the_documents_are_asked(place):  # noqa: F811
    release = "[{perplexity: {max_increase: 5%}}, {accuracy: {max_drop: 3.0}}, {footprint: {max_mb: 80}}]"
    reads, left_out = holdout.checks(load(place, INT8, release=release))
    assert [c.name for c in reads] == ["perplexity"] and left_out == ["accuracy"]
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+  data.holdout: no release check reads its documents"):
        run.apply(load(place, INT8, release="[{accuracy: {max_drop: 3.0}}]"), store=None)


@pytest.fixture(scope="module")
def uses(place, tmp_path_factory):  # noqa: F811
    """Two recipes over one holdout, and the first again; what was said at each, and the skewness of what was judged."""
    folder, found = tmp_path_factory.mktemp("uses"), []
    store = Store(folder / "home")
    for i, step in enumerate((INT8, INT8.replace("group_size: 32", "group_size: 16"), INT8)):
        said: list[str] = []
        skews: list[float] = []

        def noted(values, skews=skews):
            skews.append(skewness(values))
            return skews[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("compress.decisions.skewness", noted)
            record, _ = run.apply(load(place, step), folder / f"run{i}", store, Reporter(say=said.append))
        found.append((record, said, skews))
    return found


def test_the_final_model_sees_it_once_and_a_second_model_pays(uses):
    (first, said1, skews1), (second, said2, skews2), (again, said3, _) = uses
    assert [r.holdout.use for r in (first, second, again)] == [1, 2, 1]
    assert [r.holdout.before for r in (first, second, again)] == [[], ["recipe"], []]
    assert again.holdout == first.holdout and not any("not fresh" in line for line in (*said1, *said3))
    assert any("not fresh: 1 models before this one" in line and "1/6" in line for line in said2)
    a, b = (next(c for c in r.holdout.gate.checks if c.metric == "perplexity") for r in (first, second))
    assert {a.verdict, b.verdict} == {"PASS"} and a.examples == b.examples
    # of two checks, each fails the gate at half of that
    for check, alpha, skews in ((a, 0.05 / 2, skews1), (b, 0.05 / 6, skews2)):
        n, planned = check.examples, min(PLANNED, first.holdout.documents)
        found = (check.upper - check.loss) / (check.loss - check.lower)

        def ratio(skew, n=n, planned=planned, alpha=alpha):
            sides = ((alpha, skew), (alpha / 2, -skew))
            up, down = (width(n, 1.0, level, mixture_variance(level, planned), side) for level, side in sides)
            return up / down

        assert any(found == pytest.approx(ratio(skew), rel=1e-6) for skew in skews)


def test_the_holdout_is_in_every_rendering_with_its_count(uses):
    for (record, *_), seen in zip(uses[:2], (False, True), strict=True):
        read = json.loads(record.to_json())
        html, text = render_html(read), render_markdown(read)
        for page in (html, text):
            assert "sealed holdout" in page and ("have seen it" in page) == seen
        assert f"use {1 + seen} of this holdout" in text
        assert any("sealed holdout" in line and f"use {1 + seen}" in line for line in summary_lines(read))


def test_a_model_that_fails_before_spends_nothing(place, tmp_path):  # noqa: F811
    asked = load(place, INT4, release="[{perplexity: {max_increase: 0.1%}}, {divergence: {max_mean: 0.02}}]")
    record, _ = run.apply(asked, tmp_path / "run", store := Store(tmp_path / "home"))
    assert record.status != "passed" and record.holdout is None
    assert "holdout" not in render_markdown(json.loads(record.to_json()))
    (held,) = evaluation(split(requests(asked), 0), "holdout")
    assert holdout.spend(store, record.baseline.digest, held, "m", "next") == (1, [])


def test_a_plan_says_what_the_first_use_can_prove(place):  # noqa: F811
    asked = load(place, INT8)
    found = describe(asked, facts(resolve(asked.model)))
    (held, release) = (next(p for p in found[k] if p["metric"] == "perplexity") for k in ("holdout", "release"))
    assert 50 <= held["documents"] < release["documents"] and held["resolves"] > release["resolves"]
    assert describe(load(place, INT8, held=False), facts(resolve(asked.model)))["holdout"] == []
