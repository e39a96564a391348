"""The same report as Markdown: plain tables that any viewer shows, digests in full."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from compress.report import figures, layers, prose, scorecard, spread
from compress.report.reading import read
from compress.report.view import Artifact, Check, Report, Stage


def render_markdown(run: dict[str, Any]) -> str:
    """The Markdown text of a run's record."""
    report = read(run)
    parts = [
        _head(report),
        _scorecard(report),
        _chain(report),
        _checks(report),
        _samples(report),
        _layers(report),
        _artifacts(report),
        _baseline(report),
        _reading(report),
        _environment(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    r"""Text that Markdown shows as it is, in a table cell too.

    >>> escape("a|b <i> *c*")
    'a\\|b &lt;i&gt; \\*c\\*'
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are escaped here."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _head(report: Report) -> str:
    word = prose.STATUS_WORDS.get(report.status, report.status)
    recipe = f" · recipe {escape(report.recipe)}" if report.recipe else ""
    code = f" (exit code {escape(report.exit_code)})" if report.exit_code else ""
    lines = [f"# {escape(prose.headline(report))}", f"**{escape(word)}**{code}{recipe}"]
    if report.error:
        lines.append(f"**What stopped it:** {escape(report.error)}")
    items = []
    for claim in prose.claims(report):
        items.append(f"- **{escape(claim.check.verdict)}** {escape(prose.capital(claim.text))}")
    lines += ["\n".join(items)] if items else []
    if report.status == "passed" and prose.scope(report):
        lines.append(escape(prose.scope(report)))
    return "\n\n".join(lines)


def _scorecard(report: Report) -> str:
    rows = [
        [aspect, c.metric, c.source, c.measure.text(c.loss, signed=not c.exact), scorecard.used(c), c.verdict]
        for aspect, c in scorecard.rows(report)
    ]
    head = ["Aspect", "Measure", "Source", "Loss", "Margin used", "Verdict"]
    return "## Scorecard\n\n" + table(head, rows) if rows else ""


def _chain(report: Report) -> str:
    head = ["Stage", "Parameters", "Size", "Bits per weight", "Time", "Peak memory", "Verdict", "Digest"]
    rows = [
        [
            _title(stage),
            stage.params,
            figures.size(stage.size_bytes),
            figures.bits(stage.bits_per_weight),
            figures.seconds(stage.seconds) + (" (cached)" if stage.cached else ""),
            figures.size(stage.peak_rss_bytes),
            stage.verdict or ("" if stage.kind == "baseline" else "not gated"),
            stage.digest,
        ]
        for stage in report.stages()
    ]
    notes = [
        f"- {escape(stage.title)}: {escape(text)}"
        for stage in report.stages()
        for text in (*stage.notes, *(f"gate off for {check}" for check in stage.gate_off))
    ]
    text = "## From baseline to artifact\n\n" + table(head, rows)
    return text + ("\n\n" + "\n".join(notes) if notes else "")


def _title(stage: Stage) -> str:
    kinds = {"baseline": "baseline", "rejected": "rejected", "export": "artifact"}
    name = "final model" if stage.kind == "release" else stage.title
    return f"{name} ({kinds[stage.kind]})" if stage.kind in kinds else name


def _checks(report: Report) -> str:
    head = [
        "Gate",
        "Source",
        "Reference",
        "Value",
        "Loss",
        "Bounds",
        "Margin",
        "Confidence",
        "n",
        "Tokens",
        "Verdict",
    ]
    parts = ["## Every check against its margin"]
    for metric in report.metrics():
        pairs = [(s, c) for s in report.stages() for c in s.checks if c.metric == metric]
        parts.append(f"### {escape(prose.capital(metric))}")
        parts.append(table(head, [_check(stage, check) for stage, check in pairs]))
        parts += _percentiles(pairs)
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "No check was evaluated."])


def _check(stage: Stage, check: Check) -> list[str]:
    against = "" if check.against == "baseline" else f", against {check.against}"
    return [
        _title(stage) + against,
        check.source,
        figures.value_text(check.metric, check.reference),
        figures.value_text(check.metric, check.value),
        check.measure.text(check.loss, signed=not check.exact),
        check.bounds(),
        check.measure.limit(check.margin),
        "exact" if check.exact or check.fixed else figures.percent(check.confidence),
        figures.count(check.examples),
        figures.count(check.tokens),
        check.verdict + (f": {check.reason}" if check.reason else ""),
    ]


def _percentiles(pairs: Sequence[tuple[Stage, Check]]) -> list[str]:
    found = [(stage, check, spread.percentiles(check)) for stage, check in pairs]
    rows = [
        [_title(stage), check.source, *(figures.share(value) for value in values.values())]
        for stage, check, values in found
        if values
    ]
    return [table(["Gate", "Source", *(f"{name} of tokens" for name in spread.PERCENTILES.values())], rows)][
        : len(rows)
    ]


def _samples(report: Report) -> str:
    """Examples of the final model alone, each text cut to a line."""
    checks = report.release.checks if report.release is not None else ()
    rows = [
        [check.metric, check.source, *(_line(t) for t in (s.prompt[-200:], s.reference, s.model)), s.note]
        for check in checks
        for s in check.samples
    ]
    head = ["Metric", "Source", "Prompt (its end)", "Baseline", "Compressed", "Note"]
    return "## Answers side by side\n\n" + table(head, rows) if rows else ""


def _line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:199] + "…"


def _layers(report: Report) -> str:
    rows = []
    for stage, errors in layers.measured(report):
        median, largest, where = layers.summary(errors)
        rows.append([stage.title, figures.share(median), figures.share(largest), where])
    head = ["Step", "Median", "Largest", "Where"]
    text = "## Where the error arises\n\nRelative squared error of the output of each linear.\n\n"
    return text + table(head, rows) if rows else ""


def _artifacts(report: Report) -> str:
    if not report.artifacts:
        return ""
    head = ["Format", "Path", "Runtime", "Compute", "Weights", "Size", "Bits per weight", "Gate"]
    files = [[a.stage.name, f.name, figures.size(f.size_bytes), f.sha256] for a in report.artifacts for f in a.files]
    text = "## Artifacts\n\n" + table(head, [_artifact(a) for a in report.artifacts])
    return text + ("\n\n" + table(["Format", "File", "Size", "SHA-256"], files) if files else "")


def _artifact(artifact: Artifact) -> list[str]:
    exact = {True: "exact", False: "not exact", None: figures.NOTHING}[artifact.weights_exact]
    stage = artifact.stage
    size, bits = figures.size(stage.size_bytes), figures.bits(stage.bits_per_weight)
    return [stage.name, artifact.path, artifact.runtime, artifact.compute, exact, size, bits, stage.verdict]


def _baseline(report: Report) -> str:
    if not report.readings:
        return ""
    rows = [
        [
            r.metric,
            r.source,
            figures.value_text(r.metric, r.value),
            r.interval or figures.NOTHING,
            figures.count(r.examples),
            figures.count(r.tokens),
        ]
        for r in report.readings
    ]
    return "## Baseline\n\n" + table(["Metric", "Source", "Value", "Interval", "n", "Tokens"], rows)


def _reading(report: Report) -> str:
    terms = [f"- **{escape(prose.capital(name))}**: {escape(text)}" for name, text in report.definitions.items()]
    method = [*prose.HOW_TO_READ, *filter(None, [escape(prose.sensitivity(report)), escape(prose.noise(report))])]
    return "\n\n".join(["## How to read this", *method, *(["\n".join(terms)] if terms else [])])


def _environment(report: Report) -> str:
    rows = [[key, value] for key, value in (*report.versions.items(), *report.host.items())]
    return "## Environment\n\n" + table(["What", "Value"], rows) if rows else ""
