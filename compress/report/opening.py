"""The first screen: what was compressed, what is proven about it, and the figures that matter."""

from __future__ import annotations

from compress.report import figures, parts, prose
from compress.report.charts import css_class, glyph
from compress.report.markup import Markup, element
from compress.report.view import Check, Report, Stage


def head(report: Report) -> Markup:
    """The verdict, the claims and the tiles."""
    word = prose.STATUS_WORDS.get(report.status, prose.capital(report.status))
    verdict = {"passed": "PASS", "failed": "FAIL", "inconclusive": "INCONCLUSIVE", "error": "FAIL"}
    stamp = verdict.get(report.status, "")
    kicker = ["compress report", f" \u00b7 recipe {report.recipe}" if report.recipe else ""]
    status = element("span", glyph(stamp), element("b", word), class_=f"verdict stamp {css_class(stamp)}")
    code = parts.muted(f"exit code {report.exit_code}") if report.exit_code else None
    return element(
        "header",
        element("p", element("span", kicker, class_="kicker"), element("span", status, code), class_="top"),
        element("h1", parts.typeset(prose.headline(report))),
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
        text = parts.typeset(prose.capital(claim.text))
        items.append(element("li", parts.verdict(claim.check.verdict), element("span", text)))
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
    name = parts.named(check.metric)
    shown = measure.text(check.loss, signed=not check.exact)
    bound = "at least " + measure.text(check.lower, "down")
    if check.verdict != "FAIL":
        bound = "at most " + measure.text(check.upper, "up")
    if check.loss is None:
        return _tile(name, "", "not measured", f"margin {measure.limit(check.margin)}")
    return _tile(name, "", shown, f"{bound} \u00b7 margin {measure.limit(check.margin)}")


def _tile(name: str, before: str, after: str, note: str = "") -> Markup:
    arrow = [element("span", parts.typeset(before), class_="before"), " \u2192 "] if before and after else [before]
    value = element("span", arrow, element("span", parts.typeset(after), class_="after"), class_="value")
    return element("div", element("dt", name), element("dd", value, parts.muted(parts.typeset(note)) if note else None))
