"""The tables at the end: artifacts, cost, baseline, terms and environment."""

from __future__ import annotations

from collections.abc import Mapping

from compress.report import figures, parts, prose
from compress.report.markup import Markup, element, join
from compress.report.view import Artifact, Report, Stage


def artifacts(report: Report) -> Markup | None:
    """Exported files and their digests."""
    if not report.artifacts:
        return None
    rows = [_artifact_row(a) for a in report.artifacts]
    label = "Exact means: what is read back from the files equals the gated model, bit for bit."
    columns = ("", "", "", "", "right", "right", "gate")
    table = parts.table(_ARTIFACT_HEAD, rows, "plain", label, columns)
    named = ["Format", "File", "Size", "SHA-256"]
    file_rows = [
        parts.row(
            [
                ("", a.stage.name),
                ("", element("code", f.name)),
                ("right", parts.figure(figures.size(f.size_bytes))),
                ("", parts.digest(f.sha256)),
            ],
            labels=named,
        )
        for a in report.artifacts
        for f in a.files
    ]
    listing = parts.table(named, file_rows, "plain", "Files", ("", "", "right", "")) if file_rows else None
    return parts.section("Artifacts", "artifacts", table, listing)


_ARTIFACT_HEAD = ("Format", "Runtime", "Compute", "Weights", "Size", "Bits", "Gate")
_WORK_HEAD = ("Step", "Parameters", "Time", "Peak memory", "Model digest", "Verdict")


def _artifact_row(artifact: Artifact) -> Markup:
    stage = artifact.stage
    exact = {True: "exact", False: "not exact", None: figures.NOTHING}[artifact.weights_exact]
    return parts.row(
        [
            ("", [element("b", stage.name), element("code", artifact.path) if artifact.path else None]),
            ("", artifact.runtime or figures.NOTHING),
            ("", artifact.compute or figures.NOTHING),
            ("", exact),
            ("right", parts.figure(figures.size(stage.size_bytes))),
            ("right", parts.figure(figures.bits(stage.bits_per_weight))),
            ("gate", parts.verdict(stage.verdict)),
        ],
        labels=_ARTIFACT_HEAD,
    )


def work(report: Report) -> Markup | None:
    """Attempts with their time and memory."""
    if not report.attempts:
        return None
    stages = [*report.attempts, *(a.stage for a in report.artifacts if a.stage.seconds is not None)]
    longest = max([s.seconds or 0.0 for s in stages])
    rows = [_work_row(s, longest) for s in stages]
    total = figures.seconds(sum(s.seconds or 0.0 for s in stages))
    columns = ("", "wide", "time", "right", "", "gate")
    label = f"All attempts, in order; {total} in sum."
    return parts.section("Attempts and their cost", "work", parts.table(_WORK_HEAD, rows, "plain work", label, columns))


def _work_row(stage: Stage, longest: float) -> Markup:
    rest = []
    if stage.seconds is not None and longest > 0:
        width = f"{100 * stage.seconds / longest:.2f}%"
        bar = element("rect", x="0%", y=0, width=width, height=4, class_="amount")
        rest = [element("svg", bar, class_="sizebar", width="100%", height=4, aria_hidden="true")]
    return parts.row(
        [
            ("", element("b", stage.title)),
            ("wide", element("code", stage.params) if stage.params else "\u2013"),
            (
                "time",
                [parts.figure(figures.seconds(stage.seconds)), parts.muted(" cached") if stage.cached else None, rest],
            ),
            ("right", parts.figure(figures.size(stage.peak_rss_bytes))),
            ("", parts.digest(stage.digest)),
            ("gate", parts.verdict(stage.verdict)),
        ],
        stage.kind,
        _WORK_HEAD,
    )


def baseline(report: Report) -> Markup:
    """The reference's own figures."""
    size = parts.figure(figures.size(report.baseline.size_bytes))
    digest = parts.digest(report.baseline.digest)
    line = element("p", element("b", report.model), " \u00b7 ", size, " \u00b7 ", digest, class_="note")
    if not report.readings:
        return parts.section("Baseline", "baseline", line)
    head = ["Metric", "Source", "Value", "Interval", "Examples", "Tokens"]
    rows = [
        parts.row(
            [
                ("", prose.capital(r.metric)),
                ("", r.source or "\u2013"),
                ("right", parts.figure(figures.value_text(r.metric, r.value))),
                ("right", parts.figure(r.interval or figures.NOTHING)),
                ("right", parts.figure(figures.count(r.examples))),
                ("right", parts.figure(figures.count(r.tokens))),
            ],
            labels=head,
        )
        for r in report.readings
    ]
    columns = ("", "", "right", "right", "right", "right")
    return parts.section(
        "Baseline", "baseline", line, parts.table(head, rows, "plain", "The reference of every gate", columns)
    )


def reading(report: Report) -> Markup:
    """How to read a verdict, and the terms."""
    terms = [
        element("div", element("dt", parts.named(name)), element("dd", text))
        for name, text in report.definitions.items()
        if name not in report.metrics()  # those stand with their checks
    ]
    method = [
        element("p", text) for text in (*prose.HOW_TO_READ, prose.sensitivity(report), prose.noise(report)) if text
    ]
    words = element("dl", terms, class_="terms") if terms else None
    return parts.section("How to read this", "reading", element("div", method, class_="method"), words)


def environment(report: Report) -> Markup | None:
    """Versions and host."""
    blocks = [_pairs("Versions", report.versions), _pairs("Host", report.host)]
    return parts.section("Environment", "environment", blocks) if join(blocks) else None


def _pairs(title: str, values: Mapping[str, str]) -> Markup | None:
    if not values:
        return None
    items = [element("div", element("dt", key), element("dd", value)) for key, value in values.items()]
    return element("div", element("h3", title), element("dl", items, class_="pairs"))
