"""The HTML page: one file, no script, no network; the style is allowed by its hash alone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from compress.report import charts, figures, prose
from compress.report.charts import Axis, css_class, glyph
from compress.report.markup import Child, Markup, element, join
from compress.report.view import Artifact, Check, Report, Stage, read, worst


def render_html(run: dict[str, Any]) -> str:
    """The report page of a run's record."""
    report = read(run)
    style = files("compress.report").joinpath("page.css").read_text(encoding="utf-8")
    body = element(
        "main",
        _head(report),
        _chain(report),
        _evidence(report),
        _artifacts(report),
        _work(report),
        _baseline(report),
        _reading(report),
        _environment(report),
    )
    page = element("html", _meta(report, style), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _meta(report: Report, style: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{prose.headline(report)} \u2013 compress"),
        element("style", Markup(style)),
    )


def typeset(text: str) -> str:
    """Figures for print: real minus and multiplication signs, numbers kept with their units."""
    text = re.sub(r"(?<![\w.\-])-(?=\d)", "\u2212", text)
    text = re.sub(r"(?<=\d)x(?= smaller)", "\u00d7", text)
    return re.sub(r"(?<=\d) (?=(?:%|pp|nats|bits|[kMGT]?B|s|min|h)\b|%)", "\u202f", text)


def _figure(text: str, kind: str = "") -> Markup:
    return element("span", typeset(text), class_=f"figure {kind}".strip())


def _muted(*children: Child) -> Markup:
    return element("small", children)


def _verdict(verdict: str, absent: str = "not gated") -> Markup:
    word = verdict or absent
    return element("span", glyph(verdict), element("b", word), class_=f"verdict {css_class(verdict)}")


def _section(title: str, identifier: str, *children: Child) -> Markup:
    heading = element("h2", title, id=identifier)
    return element("section", heading, children, aria_labelledby=identifier)


def _table(head: Sequence[Child], rows: Iterable[Markup], kind: str, label: str, columns: Sequence[str] = ()) -> Markup:
    """A table that keeps its roles when narrow screens turn its rows into blocks."""
    names = columns or [""] * len(head)
    cells = [_heading(h, n) for h, n in zip(head, names, strict=True)]
    top = element("thead", element("tr", cells, role="row"), role="rowgroup")
    body = element("tbody", rows, role="rowgroup")
    return element("table", element("caption", label), top, body, class_=kind, role="table")


def _heading(content: Child, kind: str) -> Markup:
    if content == "":  # a column that this table leaves empty
        return element("td", role="cell", class_=kind or None)
    return element("th", content, scope="col", role="columnheader", class_=kind or None)


def _row(cells: Sequence[tuple[str, Child]], kind: str | None = None, labels: Sequence[str] | None = None) -> Markup:
    """A row of (class, content); the first cell heads it. labels: the column's words for narrow screens."""
    first, *rest = cells
    head = element("th", first[1], scope="row", role="rowheader", class_=first[0] or None)
    words = labels[1:] if labels else [None] * len(rest)
    others = [
        element("td", content, role="cell", class_=name or None, data_label=word)
        for (name, content), word in zip(rest, words, strict=True)
    ]
    return element("tr", head, others, role="row", class_=kind)


# ---------------------------------------------------------------- head


def _head(report: Report) -> Markup:
    word = prose.STATUS_WORDS.get(report.status, prose.capital(report.status))
    verdict = {"passed": "PASS", "failed": "FAIL", "inconclusive": "INCONCLUSIVE", "error": "FAIL"}
    stamp = verdict.get(report.status, "")
    kicker = ["compress report", f" \u00b7 recipe {report.recipe}" if report.recipe else ""]
    status = element("span", glyph(stamp), element("b", word), class_=f"verdict stamp {css_class(stamp)}")
    code = _muted(f"exit code {report.exit_code}") if report.exit_code else None
    return element(
        "header",
        element("p", element("span", kicker, class_="kicker"), element("span", status, code), class_="top"),
        element("h1", typeset(prose.headline(report))),
        _error(report),
        _claims(report),
        _tiles(report),
    )


def _error(report: Report) -> Markup | None:
    if not report.error:
        return None
    return element("p", element("b", "What stopped it: "), report.error, class_="error")


def _claims(report: Report) -> Markup | None:
    claims = prose.claims(report)
    if not claims:
        return None if report.status == "error" else element("p", "No check is recorded.", class_="lead")
    items = []
    for claim in claims:
        text = typeset(prose.capital(claim.text))
        items.append(element("li", _verdict(claim.check.verdict), element("span", text)))
    note = prose.scope(report) if report.status == "passed" else _attempts_note(report)
    heading = {"passed": "What is proven", "failed": "What failed"}.get(report.status, "What is not proven")
    return element(
        "div",
        element("h2", heading, class_="small"),
        element("ul", items, class_="claims"),
        element("p", note, class_="note") if note else None,
    )


def _attempts_note(report: Report) -> str:
    rejected = sum(s.kind == "rejected" for s in report.attempts)
    return f"{figures.count(float(rejected), 'attempts')} rejected; nothing was published." if rejected else ""


def _tiles(report: Report) -> Markup:
    before, after = report.baseline, _smallest(report)
    tiles = [_tile("Size", figures.size(before.size_bytes), figures.size(after.size_bytes) if after else "")]
    if after is not None:
        gain = prose.ratio(before.size_bytes, after.size_bytes)
        if report.status != "passed" and after.kind == "step":
            gain = f"after step {after.label}, the last accepted"
        tiles[0] = _tile("Size", figures.size(before.size_bytes), figures.size(after.size_bytes), gain)
        if after.bits_per_weight is not None:
            origin = figures.bits(before.bits_per_weight) if before.bits_per_weight is not None else ""
            tiles.append(_tile("Bits per weight", origin, figures.bits(after.bits_per_weight), "all tensors counted"))
    first = {claim.check.metric: claim.check for claim in reversed(prose.claims(report))}
    tiles += [_claim_tile(check) for check in list(reversed(first.values()))[:2]]
    return element("dl", tiles, class_="tiles")


def _smallest(report: Report) -> Stage | None:
    sized = [a.stage for a in report.artifacts if a.stage.size_bytes is not None]
    if sized:
        return min(sized, key=lambda s: s.size_bytes or 0.0)
    final = report.final()
    return final if final is not None and final.size_bytes is not None else None


def _claim_tile(check: Check) -> Markup:
    measure = check.measure
    name = _named(check.metric)
    shown = measure.text(check.loss, signed=not check.exact)
    bound = "at least " + measure.text(check.lower, "down")
    if check.verdict != "FAIL":
        bound = "at most " + measure.text(check.upper, "up")
    if check.loss is None:
        return _tile(name, "", "not measured", f"margin {measure.limit(check.margin)}")
    return _tile(name, "", shown, f"{bound} \u00b7 margin {measure.limit(check.margin)}")


def _tile(name: str, before: str, after: str, note: str = "") -> Markup:
    arrow = [element("span", typeset(before), class_="before"), " \u2192 "] if before and after else [before]
    value = element("span", arrow, element("span", typeset(after), class_="after"), class_="value")
    return element("div", element("dt", name), element("dd", value, _muted(typeset(note)) if note else None))


# ---------------------------------------------------------------- chain


def _chain(report: Report) -> Markup:
    stages = list(report.stages())
    metric = next(iter(report.metrics()), "")
    shown = {id(s): worst(s.checks, metric) for s in stages}
    axis = Axis.over([c for c in shown.values() if c is not None])
    largest = max([s.size_bytes or 0.0 for s in stages])
    last = max(i for i, s in enumerate(stages) if s.kind != "rejected" or i == len(stages) - 1)
    rows = [
        _chain_row(s, shown[id(s)], axis, largest, report, (i == 0, i == last, i <= last)) for i, s in enumerate(stages)
    ]
    unit = f" ({axis.measure.suffix.strip()})" if axis.measure.suffix.strip() else ""
    loss: Child = ""
    if metric:
        loss = [
            element("span", f"{prose.capital(metric)} loss{unit}, worst source"),
            charts.axis_header(axis),
        ]
    head = ["Stage", "Size and bits per weight", loss, "Gate"]
    label = "Every model that was made, in order. Branches are rejected attempts and exported artifacts."
    columns = ("stage", "size", "plotted", "gate")
    return _section("From baseline to artifact", "chain", _table(head, rows, "chain", label, columns))


def _chain_row(
    stage: Stage,
    check: Check | None,
    axis: Axis,
    largest: float,
    report: Report,
    ends: tuple[bool, bool, bool],
) -> Markup:
    title = element("span", stage.label, class_="label") if stage.label else None
    kinds = {"baseline": "baseline", "release": "release gate", "export": "artifact", "rejected": "rejected"}
    name = "final model" if stage.kind == "release" else stage.name
    tag = kinds.get(stage.kind, "cached" if stage.cached else "")
    node = [
        charts.gutter(stage, *ends),
        element("span", title, element("b", name), element("i", tag) if tag else None, class_="name"),
        element("code", _short(stage.params, 88), title=stage.params) if stage.params else None,
        [element("small", f"Note: {note}") for note in stage.notes],
        element("small", f"Gate off: {', '.join(stage.gate_off)}") if stage.gate_off else None,
    ]
    verdict: Child = None if stage.kind == "baseline" else [_verdict(stage.verdict), _tally(stage)]
    cells: list[tuple[str, Child]] = [
        ("stage branch" if stage.kind in {"rejected", "export"} else "stage", node),
        ("size", _size(stage, largest, report)),
        ("plotted", _loss(stage, check, axis, report)),
        ("gate", verdict),
    ]
    return _row(cells, stage.kind)


def _tally(stage: Stage) -> Markup:
    passed = sum(c.verdict == "PASS" for c in stage.checks)
    return _muted(f"{passed} of {len(stage.checks)} checks pass" if stage.checks else "no checks")


def _size(stage: Stage, largest: float, report: Report) -> Child:
    if stage.size_bytes is None:
        return _muted("not stored" if stage.kind == "rejected" else figures.NOTHING)
    if stage.kind == "release":
        return _muted("as above")
    parts = [figures.size(stage.size_bytes)]
    if stage.bits_per_weight is not None:
        parts.append(f"{figures.bits(stage.bits_per_weight)} bits")
    note = prose.ratio(report.baseline.size_bytes, stage.size_bytes)
    text = element("span", _figure(parts[0]), [_muted(" \u00b7 ", typeset(p)) for p in (*parts[1:], note) if p])
    return [text, charts.size_bar(stage.size_bytes, largest, stage.title)]


def _loss(stage: Stage, check: Check | None, axis: Axis, report: Report) -> Child:
    if stage.kind == "baseline":
        values = [r for r in report.readings if r.metric in {"perplexity", *report.metrics()[:1]}]
        known = [f"{r.source or r.metric} {figures.value_text(r.metric, r.value)}" for r in values]
        return _muted(f"{values[0].metric} {', '.join(known)}") if values else None
    if check is None:
        return _muted("not checked")
    return [
        charts.interval(axis, check, f"{stage.title}, {check.metric}"),
        element(
            "span",
            _figure(check.measure.text(check.loss, signed=not check.exact)),
            _muted(typeset(f" {check.bounds()} \u00b7 margin {check.measure.limit(check.margin)}")),
            class_="under",
        ),
    ]


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\u2026"


# ---------------------------------------------------------------- evidence


def _evidence(report: Report) -> Markup:
    blocks = [_metric_block(report, metric) for metric in report.metrics()]
    key = element(
        "p",
        "The mark is the measured loss, the bar its confidence bounds; the shaded range is what the margin "
        "allows, up to the vertical line. An arrow continues beyond the axis.",
        class_="note",
    )
    absent = element("p", "No check was evaluated.", class_="note")
    return _section("Every check against its margin", "evidence", key if blocks else absent, blocks)


def _metric_block(report: Report, metric: str) -> Markup:
    pairs = [(s, c) for s in report.stages() for c in s.checks if c.metric == metric]
    axis = Axis.over([c for _, c in pairs])
    unit = axis.measure.suffix.strip()
    exact = all(c.exact for _, c in pairs)
    sample = ["", "", ""] if exact else [_named(metric), prose.capital(pairs[0][1].noun), "Tokens"]
    plotted = [
        element("span", f"{'Measured' if exact else 'Loss'}{f' in {unit}' if unit else ''}"),
        charts.axis_header(axis, signed=not exact),
    ]
    head: list[Child] = ["Gate", "Source", plotted, "Measured", "Bounds", "Margin", *sample, "Verdict"]
    levels = sorted({figures.percent(c.confidence) for _, c in pairs if not (c.exact or c.fixed)})
    label = prose.capital(report.definitions.get(metric, "").rstrip("."))
    if levels:
        label = f"{label}. Bounds at {figures.listed(levels)} confidence.".removeprefix(". ")
    stages = [s for s, _ in pairs]
    repeats = [i > 0 and stages[i - 1] is s for i, s in enumerate(stages)]
    rows = [_check_row(s, c, axis, again) for (s, c), again in zip(pairs, repeats, strict=True)]
    title = element("h3", _named(metric))
    table = _table(head, rows, "evidence", typeset(label), _EVIDENCE_COLUMNS)
    return element("div", title, table, _details(pairs), class_="metric")


def _named(metric: str) -> str:
    return prose.capital(metric.replace("_", " "))


_EVIDENCE_COLUMNS = ("stage", "source", "plotted", "loss", "bounds", "limit", "change", "n", "tokens", "gate")


def _check_row(stage: Stage, check: Check, axis: Axis, again: bool) -> Markup:
    measure = check.measure
    change = figures.value_text(check.metric, check.value)
    if check.reference and not check.exact:
        change = f"{figures.value_text(check.metric, check.reference)} \u2192 {change}"
    name = "final model" if stage.kind == "release" else stage.name
    label = f"{stage.label} " if stage.label else None
    source: Child = check.source or "\u2013"
    if check.against != "baseline":
        source = [check.source, _muted(f"against {check.against}")]
    rejected = element("i", "rejected") if stage.kind == "rejected" else None
    cells: list[tuple[str, Child]] = [
        ("stage", [element("span", label), element("b", name), rejected]),
        ("source", source),
        ("plotted", charts.interval(axis, check, f"{stage.title}, {check.source or check.metric}")),
        ("loss", _figure(measure.digits(check.loss, signed=not check.exact))),
        ("bounds", _figure(check.bounds(unit=False))),
        ("limit", _figure(measure.limit(check.margin).removesuffix(measure.suffix))),
        ("change", _figure("" if check.exact else change)),
        ("n", _figure("" if check.source == "files" else figures.count(check.examples))),
        ("tokens", _figure("" if check.source == "files" else figures.count(check.tokens))),
        ("gate", [_verdict(check.verdict), _muted(check.reason) if check.reason else None]),
    ]
    return _row(cells, f"{stage.kind} again" if again else stage.kind)


def _details(pairs: Sequence[tuple[Stage, Check]]) -> Markup | None:
    """What else the gate recorded, folded away."""
    items = []
    for stage, check in pairs:
        if not check.details:
            continue
        text = ", ".join(figures.detail(key, value) for key, value in check.details.items())
        where = f"{'final model' if stage.kind == 'release' else stage.title} {check.source}".strip()
        items.append(element("div", element("dt", where), element("dd", text)))
    if not items:
        return None
    return element("details", element("summary", "Further figures of these checks"), element("dl", items))


# ---------------------------------------------------------------- tables


def _artifacts(report: Report) -> Markup | None:
    if not report.artifacts:
        return None
    rows = [_artifact_row(a) for a in report.artifacts]
    label = "Exact means: what is read back from the files equals the gated model, bit for bit."
    columns = ("", "", "", "", "right", "right", "gate")
    table = _table(_ARTIFACT_HEAD, rows, "plain", label, columns)
    named = ["Format", "File", "Size", "SHA-256"]
    file_rows = [
        _row(
            [
                ("", a.stage.name),
                ("", element("code", f.name)),
                ("right", _figure(figures.size(f.size_bytes))),
                ("", _digest(f.sha256)),
            ],
            labels=named,
        )
        for a in report.artifacts
        for f in a.files
    ]
    listing = _table(named, file_rows, "plain", "Files", ("", "", "right", "")) if file_rows else None
    return _section("Artifacts", "artifacts", table, listing)


_ARTIFACT_HEAD = ("Format", "Runtime", "Compute", "Weights", "Size", "Bits", "Gate")
_WORK_HEAD = ("Step", "Parameters", "Time", "Peak memory", "Model digest", "Verdict")


def _artifact_row(artifact: Artifact) -> Markup:
    stage = artifact.stage
    exact = {True: "exact", False: "not exact", None: figures.NOTHING}[artifact.weights_exact]
    return _row(
        [
            ("", [element("b", stage.name), element("code", artifact.path) if artifact.path else None]),
            ("", artifact.runtime or figures.NOTHING),
            ("", artifact.compute or figures.NOTHING),
            ("", exact),
            ("right", _figure(figures.size(stage.size_bytes))),
            ("right", _figure(figures.bits(stage.bits_per_weight))),
            ("gate", _verdict(stage.verdict)),
        ],
        labels=_ARTIFACT_HEAD,
    )


def _digest(digest: str) -> Markup | str:
    if not digest:
        return figures.NOTHING
    bare = digest.removeprefix("sha256:")
    return element("code", bare[:12] + ("\u2026" if len(bare) > 12 else ""), title=digest)


def _work(report: Report) -> Markup | None:
    if not report.attempts:
        return None
    stages = [*report.attempts, *(a.stage for a in report.artifacts if a.stage.seconds is not None)]
    longest = max([s.seconds or 0.0 for s in stages])
    rows = [_work_row(s, longest) for s in stages]
    total = figures.seconds(sum(s.seconds or 0.0 for s in stages))
    columns = ("", "wide", "time", "right", "", "gate")
    label = f"All attempts, in order; {total} in sum."
    return _section("Attempts and their cost", "work", _table(_WORK_HEAD, rows, "plain work", label, columns))


def _work_row(stage: Stage, longest: float) -> Markup:
    rest = []
    if stage.seconds is not None and longest > 0:
        width = f"{100 * stage.seconds / longest:.2f}%"
        bar = element("rect", x="0%", y=0, width=width, height=4, class_="amount")
        rest = [element("svg", bar, class_="sizebar", width="100%", height=4, aria_hidden="true")]
    return _row(
        [
            ("", element("b", stage.title)),
            ("wide", element("code", stage.params) if stage.params else "\u2013"),
            (
                "time",
                [_figure(figures.seconds(stage.seconds)), _muted(" cached") if stage.cached else None, rest],
            ),
            ("right", _figure(figures.size(stage.peak_rss_bytes))),
            ("", _digest(stage.digest)),
            ("gate", _verdict(stage.verdict)),
        ],
        stage.kind,
        _WORK_HEAD,
    )


def _baseline(report: Report) -> Markup:
    size = _figure(figures.size(report.baseline.size_bytes))
    digest = _digest(report.baseline.digest)
    line = element("p", element("b", report.model), " \u00b7 ", size, " \u00b7 ", digest, class_="note")
    if not report.readings:
        return _section("Baseline", "baseline", line)
    head = ["Metric", "Source", "Value", "Interval", "Examples", "Tokens"]
    rows = [
        _row(
            [
                ("", prose.capital(r.metric)),
                ("", r.source or "\u2013"),
                ("right", _figure(figures.value_text(r.metric, r.value))),
                ("right", _figure(r.interval or figures.NOTHING)),
                ("right", _figure(figures.count(r.examples))),
                ("right", _figure(figures.count(r.tokens))),
            ],
            labels=head,
        )
        for r in report.readings
    ]
    columns = ("", "", "right", "right", "right", "right")
    return _section("Baseline", "baseline", line, _table(head, rows, "plain", "The reference of every gate", columns))


def _reading(report: Report) -> Markup:
    terms = [
        element("div", element("dt", _named(name)), element("dd", text))
        for name, text in report.definitions.items()
        if name not in report.metrics()  # those stand with their checks
    ]
    method = [element("p", text) for text in prose.HOW_TO_READ]
    words = element("dl", terms, class_="terms") if terms else None
    return _section("How to read this", "reading", element("div", method, class_="method"), words)


def _environment(report: Report) -> Markup | None:
    blocks = [_pairs("Versions", report.versions), _pairs("Host", report.host)]
    return _section("Environment", "environment", blocks) if join(blocks) else None


def _pairs(title: str, values: Mapping[str, str]) -> Markup | None:
    if not values:
        return None
    items = [element("div", element("dt", key), element("dd", value)) for key, value in values.items()]
    return element("div", element("h3", title), element("dl", items, class_="pairs"))
