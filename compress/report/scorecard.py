"""The scorecard: what the final model lost in each aspect, as a share of what its margin allows, and never a sum."""

from __future__ import annotations

from compress.report import charts, figures, parts
from compress.report.charts import Axis
from compress.report.markup import Child, Markup, element
from compress.report.view import Check, Report, worst

ASPECTS = ("quality", "safety", "robustness", "efficiency")
_COLUMNS = ("", "", "plotted", "right", "right", "gate")  # of the head
_HEAD = ("Aspect", "Measure", "Loss against its margin", "Measured", "Margin used", "Verdict")


def rows(report: Report) -> list[tuple[str, Check]]:
    """Each metric's worst source over all that ships, by aspect; nothing before the release gate."""
    if report.release is None:
        return []
    stages = [report.release, report.holdout, *(a.stage for a in report.artifacts)]
    checks = [c for stage in stages if stage is not None for c in stage.checks if c.metric != "decode"]
    found = [check for name in dict.fromkeys(c.metric for c in checks) if (check := worst(checks, name)) is not None]
    known = [(aspect, c) for aspect in ASPECTS for c in found if c.aspect == aspect]
    return known + [(c.aspect, c) for c in found if c.aspect not in ASPECTS]


def scorecard(report: Report) -> Markup | None:
    """A row per metric, all drawn to the same scale: from no loss in the middle to the margin on the right."""
    found = rows(report)
    if not found:
        return None
    seen: set[str] = set()
    body = []
    for aspect, check in found:
        body.append(_row(aspect, check, first=aspect not in seen))
        seen.add(aspect)
    absent = [aspect for aspect in ASPECTS if aspect not in seen]
    caption = (
        "The worst source of everything that ships. Each bar is drawn on its own margin: the thin line is no loss, the "
        "thick one the margin. Aspects are not added up."
    )
    nothing = f" Nothing was checked of {figures.listed(absent)}." if absent else ""
    table = parts.table(_HEAD, body, "plain score", caption + nothing, _COLUMNS)
    return parts.section("Scorecard", "scorecard", table)


def used(check: Check) -> str:
    """How much of the margin the bound that decides takes up; empty where that is no share.

    Bounds round outward.
    """
    if check.upper is None or check.margin is None or not check.margin > 0:
        return ""
    return f"{figures.rounded(100 * max(0.0, check.upper) / check.margin, 0, 'up'):.0f} %"


def _row(aspect: str, check: Check, first: bool) -> Markup:
    name = parts.named(check.metric)
    where = "" if check.source in ("", "files", check.metric) else check.source.removeprefix(f"{check.metric}: ")
    scale = abs(check.margin or check.loss or 1.0)
    axis = Axis(-1.5 * scale, 1.5 * scale, check.measure)
    cells: list[tuple[str, Child]] = [
        ("aspect", element("b", figures.clean(aspect)) if first else None),
        ("name", [name, parts.muted(where) if where else None]),
        ("plotted", charts.interval(axis, check, f"{name}, {check.source}", grid=False)),
        ("measured right", parts.figure(check.measure.text(check.loss, signed=not check.exact))),
        ("used right", parts.figure(used(check))),
        ("gate", parts.verdict(check.verdict)),
    ]
    return parts.row(cells, "first" if first else "again")
