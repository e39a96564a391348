"""What changed in the answers: examples with the texts of both models side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compress.report import figures, parts
from compress.report.markup import Child, Markup, element
from compress.report.view import Check, Report, Sample, Stage

_LONG = 420  # characters of an answer that stand without being opened
_PROMPT = 240  # characters of a prompt's end, which is what the answers continue
_TOKEN = re.compile(r"<\|[^<>|]*\|>|\w+|\s+|[^\w\s]")  # special tokens, words, spaces, signs
_HEAD = ("Prompt", "Baseline", "Compressed", "")


def samples(report: Report) -> Markup | None:
    """Per check and source: the examples of the final model, those of other stages to be opened."""
    groups: dict[tuple[str, str], list[tuple[Stage, Check]]] = {}
    for stage in report.stages():
        for check in stage.checks:
            if check.samples:
                groups.setdefault((check.metric, check.source), []).append((stage, check))
    if not groups:
        return None
    note = element(
        "p",
        "Examples as the gates saw them, with what differs between the two models marked. They show what a loss "
        "looks like; how often it happens is what the checks say.",
        class_="note",
    )
    return parts.section("Answers side by side", "samples", note, [_group(g) for g in groups.values()])


def _group(found: Sequence[tuple[Stage, Check]]) -> Markup:
    main = next((pair for pair in found if pair[0].kind == "release"), found[-1])
    _, check = main
    source = check.source.removeprefix(f"{check.metric}: ")
    title = element("h3", parts.named(check.metric), f" \u00b7 {source}" if source else None)
    others = [
        element("details", element("summary", f"{_named(stage)}: {_examples(other)}"), _table(stage, other))
        for stage, other in found
        if other is not check
    ]
    return element("div", title, _table(*main), others, class_="metric")


def _examples(check: Check) -> str:
    return figures.count(float(len(check.samples)), "examples")


def _named(stage: Stage) -> str:
    kinds = {"rejected": "rejected", "export": "artifact"}
    name = "final model" if stage.kind == "release" else stage.title
    return f"{name} ({kinds[stage.kind]})" if stage.kind in kinds else name


def _table(stage: Stage, check: Check) -> Markup:
    tagged = any(sample.note for sample in check.samples)
    rows = [_sample(sample, tagged) for sample in check.samples]
    flips = [(name, figures.number(check.details.get(name))) for name in ("right to wrong", "wrong to right")]
    counted = [f"{count:.0f} {name}" for name, count in flips if count is not None]
    more = f"; in all {figures.listed(counted)} of {figures.count(check.examples)}" if counted else ""
    caption = f"{_examples(check)} of the {_named(stage)}" if stage.kind == "release" else _examples(check)
    columns = ("prompt", "answer", "answer", "tag")[: 3 + tagged]
    return parts.table(_HEAD[: 3 + tagged], rows, "plain samples", f"{caption}{more}.", columns)


def _sample(sample: Sample, tagged: bool) -> Markup:
    reference, model = differing(sample.reference, sample.model)
    cells: list[tuple[str, Child]] = [
        ("prompt", _prompt(sample.prompt)),
        ("answer", _answer(*reference)),
        ("answer", _answer(*model)),
        ("tag", parts.muted(sample.note) if sample.note else None),
    ]
    return parts.row(cells[: 3 + tagged], labels=_HEAD[: 3 + tagged])


def differing(one: str, other: str) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """Each text as (what both begin with, what differs, what both end with), cut between words.

    >>> differing("the cat sat", "the dogs sat")
    (('the ', 'cat', ' sat'), ('the ', 'dogs', ' sat'))
    """
    a, b = (_TOKEN.findall(text) for text in (one, other))
    shortest = min(len(a), len(b))
    start = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    end = next((i for i in range(shortest - start) if a[-1 - i] != b[-1 - i]), shortest - start)
    first, second = (("".join(w[:start]), "".join(w[start : len(w) - end]), "".join(w[len(w) - end :])) for w in (a, b))
    return first, second


def _prompt(text: str) -> Child:
    if len(text) <= 1.5 * _PROMPT:
        return element("p", text)
    brief = "\u2026" + " ".join(text[-_PROMPT:].split())
    return _opened(brief, text)


def _answer(before: str, middle: str, after: str) -> Child:
    before = before.lstrip()  # the space that leads both answers
    full = [before, element("mark", middle) if middle else None, after]
    if len(before) + len(middle) + len(after) <= _LONG:
        return element("p", full if before or middle or after else parts.muted("nothing"))
    lead, rest = " ".join(before.split())[-120:], " ".join(middle.split())
    cut = len(rest) > 260 or bool(after)
    shown = element("mark", rest[:260]) if rest else None
    return _opened(["\u2026" if len(before) > 120 else None, lead, " ", shown, "\u2026" if cut else None], full)


def _opened(brief: Child, full: Child) -> Markup:
    """A text to be opened; its beginning stands in its place until then."""
    summary = element("summary", element("span", brief, class_="brief"), element("i", "all of it"))
    return element("details", summary, element("p", full))
