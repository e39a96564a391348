"""The scorecard: of a model by `compress eval`, and of a run in its report."""

import json
import math

import pytest

from compress import scorecard
from compress.measure import evaluate
from compress.plugin import evaluator, names
from compress.report import render_html, render_markdown
from compress.report import scorecard as reported
from compress.report.reading import read
from tests.records import make_check, passed_run
from tests.tiny import perturbed, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found():
    model = tiny_model()
    names = list(scorecard.DEFAULT)
    return evaluate(
        model, names, against=perturbed(model, 0.1), source="pydoc", documents=6, length=64, efficiency=True
    )


def test_the_default_looks_at_every_aspect_and_sums_up_nothing(found):
    aspects = {m["metric"]: m["aspect"] for m in found["metrics"]}
    assert set(aspects.values()) == set(scorecard.ASPECTS)
    assert aspects["stereotypes"] == "safety" and aspects["size"] == aspects["time"] == "efficiency"
    lines = scorecard.lines(found)
    assert [line for line in lines if line in scorecard.ASPECTS] == list(scorecard.ASPECTS)
    assert not any("total" in line or "overall" in line for line in lines)
    json.dumps(found, allow_nan=False)


def test_size_and_time_are_measured_on_this_model(found):
    by_name = {m["metric"]: m for m in found["metrics"]}
    weights = sum(p.numel() for p in tiny_model().module.parameters())
    assert by_name["size"]["value"] == 4 * weights and by_name["size"]["against"]["loss"] == 0
    low, high = by_name["time"]["interval"]
    assert 0 <= low < by_name["time"]["value"] < high < 1000
    assert by_name["time"]["tokens"] == scorecard.ROUNDS * scorecard.WRITTEN


def test_every_aspect_of_an_evaluator_is_one_of_the_scorecard():
    found = {name: evaluator(name).aspect for name in names("evaluator")}
    assert set(found.values()) <= set(scorecard.ASPECTS)
    assert {n for n, a in found.items() if a == "safety"} >= {"stereotypes", "pronouns"}
    assert (found["perplexity"], found["robustness"], found["footprint"]) == ("quality", "robustness", "efficiency")


def test_one_aspect_needs_no_headings():
    found = evaluate(tiny_model(), ["perplexity"], source="pydoc", documents=4, length=64)
    assert len(scorecard.lines(found)) == 2 and "quality" not in scorecard.lines(found)


@pytest.mark.parametrize(
    ("value", "low", "high", "drawn"),
    [
        (0.0, 0.0, 0.0, "|O-----------------------|"),
        (1.0, 0.9, 1.0, "|--------------------===O|"),
        (0.5, -1.0, 2.0, "|===========O============|"),
    ],
)
def test_bars_of_characters(value, low, high, drawn):
    assert scorecard.bar(value, low, high) == drawn


def run_with(*checks):
    run = passed_run()
    run["release"]["checks"] = list(checks)
    run["exports"] = []
    return run


def test_a_report_shows_the_worst_source_of_each_metric_by_aspect():
    bias = make_check("accuracy", "stereotypes", 0.004, 0.01, 0.03, "PASS")
    bias |= {"metric": "stereotypes", "unit": "fraction", "aspect": "safety"}
    good, bad = (make_check("perplexity", s, x, 0.01, 0.05, "PASS") for s, x in (("wiki", 0.01), ("pydoc", 0.03)))
    run = run_with(bias, good, bad)
    rows = reported.rows(read(run))
    assert [(a, c.metric, c.source) for a, c in rows] == [
        ("quality", "perplexity", "pydoc"),
        ("safety", "stereotypes", "stereotypes"),
    ]
    html, text = render_html(run), render_markdown(run)
    assert 'id="scorecard"' in html and "Nothing was checked of robustness and efficiency." in html
    assert "| safety | stereotypes | stereotypes | +0.40 pp | 47 % | PASS |" in text


@pytest.mark.parametrize(
    ("upper", "margin", "shown"),
    [(0.03, 0.05, "60 %"), (0.0301, 0.05, "61 %"), (-0.01, 0.05, "0 %"), (0.1, 0.05, "200 %"), (0.1, -0.5, "")],
)
def test_the_share_of_a_margin_that_is_used_is_rounded_up(upper, margin, shown):
    record = make_check("perplexity", "wiki", upper - 0.01, 0.01, margin, "PASS") | {"upper": upper}
    ((_, check),) = reported.rows(read(run_with(record)))
    assert reported.used(check) == shown


def test_before_the_release_gate_there_is_no_scorecard():
    run = passed_run() | {"release": None, "exports": []}
    assert reported.rows(read(run)) == [] and "Scorecard" not in render_html(run)


def test_what_cannot_be_measured_is_drawn_as_such():
    check = make_check("perplexity", "wiki", None, 0.0, math.nan, "INVALID")
    assert "not measured" in render_html(run_with(check))
