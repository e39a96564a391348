"""The model card of an artifact: the hub's front matter, what was proven, how to load it, how to check it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from compress.provenance.facts import checks_of, shown
from compress.report import figures
from compress.report.markdown import escape, table
from compress.report.reading import check
from compress.report.view import Check

FILE = "README.md"


def render(facts: Mapping[str, Any]) -> str:
    """The card as Markdown; facts: a manifest's, with the files of the exporter."""
    parts = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {escape(facts['name'])} ({escape(facts['format'])})",
        _summary(facts),
        _metrics(facts),
        _usage(facts),
        _steps(facts),
        _files(facts),
        _origin(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = facts["base_model"]
    data = ModelCardData(
        base_model=base["repository"] or base["name"],
        language=base["languages"] or None,
        license=base["license"],
        pipeline_tag=facts["task"],
        tags=[facts["format"], "quantized", "compress-toolkit", *(["gated"] if facts["gates"] else [])],
        base_model_relation="quantized",
        quantized_by="compress-toolkit",
    )
    return str(data.to_yaml()).strip()


def _summary(facts: Mapping[str, Any]) -> str:
    base = facts["base_model"]
    size = f"{figures.size(facts['size_bytes'])}, {figures.bits(facts['bits_per_weight'])} bits per weight"
    before = f", from {figures.size(base['bytes'])}" if base.get("bytes") else ""
    named = f"[{escape(base['repository'])}](https://huggingface.co/{base['repository']})" if base["repository"] else ""
    text = f"{named or escape(base['name'])}, compressed to {size}{before}."
    if facts["gates"]:
        text += " Every gate below passed on this very file, in the runtime that executes it."
    else:
        text += " **No gate has looked at it**: its weights are exact, and nothing is proven about their loss."
    if facts["zeros"]:
        text += f"\n\nMeasured: {escape(facts['zeros']['finding'])}."
    if not base["license"]:
        text += " The base model's files state no licence."
    return text


def _metrics(facts: Mapping[str, Any]) -> str:
    checks = [check(record) for record in checks_of(facts)]
    if not checks:
        return ""
    head = ["Metric", "Source", "Base model", "This model", "Loss", "Bounds", "Margin", "Confidence", "n", "Verdict"]
    note = (
        "Losses are measured against the base model, paired by document. Bounds are those of the gate: PASS means "
        "that the upper one is within the margin."
    )
    return "\n\n".join(["## What is proven", table(head, [_row(c) for c in checks]), note])


def _row(found: Check) -> list[str]:
    known = found.exact or found.fixed
    return [
        found.metric,
        shown(found.source),
        figures.value_text(found.metric, found.reference) if found.against == "baseline" else f"its {found.against}",
        figures.value_text(found.metric, found.value),
        found.measure.text(found.loss, signed=not found.exact),
        found.bounds(),
        found.measure.limit(found.margin),
        "exact" if known else figures.percent(found.confidence),
        figures.count(found.examples),
        found.verdict,
    ]


def _usage(facts: Mapping[str, Any]) -> str:
    files = facts["files"]
    largest = max(files, key=lambda name: int(files[name]["bytes"]))
    lines = [f"- {escape(runtime)}: `{line.replace('{file}', largest)}`" for runtime, line in facts["usage"].items()]
    compute = f"Gated with {escape(facts['runtime'])}: {escape(facts['compute'])}." if facts["compute"] else ""
    return "\n\n".join(["## Load it", "\n".join(lines), compute]).strip() if lines else ""


def _steps(facts: Mapping[str, Any]) -> str:
    rows = []
    for step in facts["steps"]:
        verdict = step["gate"]["verdict"] if step["gate"] else "not gated"
        rows.append([step["name"], figures.parameters(step["params"]), verdict, step["digest"]])
    return "## How it was made\n\n" + table(["Step", "Parameters", "Gate", "Digest"], rows) if rows else ""


def _files(facts: Mapping[str, Any]) -> str:
    rows = [[name, figures.size(file["bytes"]), file["sha256"]] for name, file in facts["files"].items()]
    return "## Files\n\n" + table(["File", "Size", "SHA-256"], rows)


def _origin(facts: Mapping[str, Any]) -> str:
    """Where everything came from, by digest, and the command that re-checks the files."""
    rows = [["compress-toolkit", facts["versions"]["compress-toolkit"], facts["code"]["sha256"]], *_sources(facts)]
    check = "`compress verify FOLDER` re-checks every digest in `compression.json`, which also holds the recipe, the "
    return "\n\n".join(
        [
            "## Where it comes from",
            table(["What", "Which", "Digest"], rows),
            f"{check}versions of all libraries and every figure above; `bom.json` is a CycloneDX ML-BOM.",
        ]
    )


def _sources(facts: Mapping[str, Any]) -> Iterator[list[str]]:
    base, params = facts["base_model"], json.dumps(facts["params"], sort_keys=True)
    yield ["base model", shown(base["source"]), base.get("digest", "")]
    yield ["this model", f"in torch, written by {facts['format']} {params}", facts["model"]["digest"]]
    for part in facts["data"]:
        yield [f"{part['role']} data", f"{shown(part['source'])}, {part['documents']} documents", part["digest"]]
