"""The report's pictures of layers and percentiles, and answers side by side."""

from __future__ import annotations

import copy
import html
import math
import re
import statistics

import pytest

from compress.report import figures, render_html, render_markdown
from compress.report.reading import check as read_check
from compress.report.samples import differing
from tests.records import (
    HOSTILE,
    Record,
    Structure,
    errors,
    every_check,
    failed_run,
    make_flips,
    passed_run,
)


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


def test_the_map_of_encodings_shows_every_linear_and_is_left_out_where_all_are_alike() -> None:
    run = passed_run()
    assert 'id="encodings"' not in render_html(run)
    names = list(run["steps"][2]["layer_errors"])
    stored = {name: ("int8 g32", "int3 g32", "int4 g32")[i % 3] for i, name in enumerate(names)}
    run["steps"][2]["encodings"] = stored | {"model.embed_tokens": "int8 g32"}
    found = section(render_html(run), "encodings")
    shown = cells(found)
    strength = {"int3 g32": 0.15, "int4 g32": 0.57, "int8 g32": 1.0}
    assert len(shown) == 36 and {float(level) for _, level in shown} == set(strength.values())
    for name, kind in stored.items():
        _, _, layer, _, part = name.split(".")
        (words,) = [w for w, _ in shown if w.startswith(f"layer {layer},") and w.split(": ")[0].endswith(part)]
        assert words.endswith(kind) and dict(shown)[words] == strength[kind]
    assert re.findall(r"(int\d g32): (\d+) linears", found) == [(kind, "12") for kind in strength]
    assert "after step 3b quantize.gptq" in found
    run["steps"][2]["encodings"] = dict.fromkeys(names, "int4 g32") | {"model.embed_tokens": "int8 g32"}
    assert 'id="encodings"' not in render_html(run)
    run["steps"][2]["encodings"] = {"model.layers.0.a": HOSTILE, "model.layers.1.a": 7, "x": None}
    assert HOSTILE not in section(render_html(run), "encodings")
