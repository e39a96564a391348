"""The HTML page: one file, no script, no network; the style is allowed by its hash alone."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from compress.report import chain, encodings, evidence, layers, opening, prose, samples, scorecard, tables
from compress.report.markup import Markup, element
from compress.report.reading import read


def render_html(run: dict[str, Any]) -> str:
    """The report page of a run's record."""
    report = read(run)
    style = files("compress.report").joinpath("page.css").read_text(encoding="utf-8")
    body = element(
        "main",
        opening.head(report),
        scorecard.scorecard(report),
        chain.chain(report),
        evidence.evidence(report),
        samples.samples(report),
        layers.layers(report),
        encodings.encodings(report),
        tables.artifacts(report),
        tables.work(report),
        tables.baseline(report),
        tables.reading(report),
        tables.environment(report),
    )
    title = f"{prose.headline(report)} \u2013 compress"
    page = element("html", head(title, style), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def head(title: str, style: str) -> Markup:
    """The head of a page without scripts: its style, and a policy that allows nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(style)),
    )
