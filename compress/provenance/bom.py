"""A CycloneDX ML-BOM of an artifact: the model with its card, the base model, the data, the files, the libraries.

Built here, as the CycloneDX library for Python knows no model cards; a test validates it against the library's schema.
No timestamp, and a serial number that follows from the content: equal artifacts have equal bills.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from compress.provenance.facts import checks_of, shown

FILE = "bom.json"
SPECIFICATION = "1.6"
_BASE, _MODEL = "base-model", "model"


def render(facts: Mapping[str, Any]) -> str:
    """The bill as JSON text; facts: a manifest's, with the files of the exporter."""
    datasets = list(_datasets(facts))
    libraries = list(_libraries(facts["versions"]))
    model = _model(facts, datasets)
    needs = [_BASE, *(d["bom-ref"] for d in datasets), *(c["bom-ref"] for c in libraries)]
    bill = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {"tools": {"components": [_tool(facts)]}, "component": model},
        "components": [_base(facts), *datasets, *libraries],
        "dependencies": [{"ref": _MODEL, "dependsOn": needs}],
    }
    text = json.dumps(bill, sort_keys=True)
    return json.dumps({**bill, "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, text).urn}, indent=1) + "\n"


def _model(facts: Mapping[str, Any], datasets: list[dict[str, Any]]) -> dict[str, Any]:
    """The artifact itself; its parts are its files."""
    found = {
        "bom-ref": _MODEL,
        "type": "machine-learning-model",
        "name": facts["name"],
        "description": f"{facts['base_model']['name']}, compressed and exported as {facts['format']}",
        "licenses": _licenses(facts),
        "pedigree": {"ancestors": [_base(facts, reference=False)]},
        "components": [_file(name, file) for name, file in facts["files"].items()],
        "modelCard": _card(facts, datasets),
        "properties": _properties(
            {
                "format": facts["format"],
                "params": json.dumps(facts["params"], sort_keys=True),
                "runtime": facts["runtime"],
                "compute": facts["compute"],
                "weights_exact": facts["weights_exact"],
                "parameters": facts["parameters"],
                "size_bytes": facts["size_bytes"],
                "bits_per_weight": facts["bits_per_weight"],
                "model_digest": facts["model"]["digest"],
                "gate": facts["gates"]["artifact"]["verdict"] if facts["gates"] else "none",
            }
        ),
    }
    return {key: value for key, value in found.items() if value}


def _card(facts: Mapping[str, Any], datasets: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = [metric for check in checks_of(facts) for metric in _metrics(check)]
    return {
        "modelParameters": {
            "task": facts["task"],
            "architectureFamily": "transformer",
            "datasets": [{"ref": d["bom-ref"]} for d in datasets],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
    }


def _metrics(check: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metric's own value, and its loss against the reference with the bounds of the gate."""
    name, place = check["metric"], {"slice": shown(check["source"])} if check["source"] else {}
    if check["value"] is not None:
        yield {"type": name, "value": str(check["value"]), **place}
    if check["loss"] is not None and check["lower"] is not None and check["upper"] is not None:
        yield {
            "type": f"{name} loss against {check['against']} ({check['unit']})",
            "value": str(check["loss"]),
            **place,
            "confidenceInterval": {"lowerBound": str(check["lower"]), "upperBound": str(check["upper"])},
        }


def _base(facts: Mapping[str, Any], reference: bool = True) -> dict[str, Any]:
    """The model that was compressed. reference: as a component of its own, which others name."""
    base = facts["base_model"]
    repository = base["repository"]
    links = [{"type": "distribution", "url": f"https://huggingface.co/{repository}"}] if repository else []
    found = {
        "bom-ref": _BASE if reference else None,
        "type": "machine-learning-model",
        "name": base["name"],
        "licenses": _licenses(facts),
        "externalReferences": links,
        "properties": _properties({"source": shown(base["source"]), "digest": base.get("digest")}),
    }
    return {key: value for key, value in found.items() if value}


def _licenses(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    # By name: the hub's identifiers are lower case, SPDX's are not, and some are not SPDX's at all.
    name = facts["base_model"]["license"]
    return [{"license": {"name": name}}] if name else []


def _datasets(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for i, part in enumerate(facts["data"]):
        yield {
            "bom-ref": f"data-{i}",
            "type": "data",
            "name": shown(part["source"]),
            "hashes": [{"alg": "SHA-256", "content": part["digest"]}],
            "data": [{"type": "dataset", "name": shown(part["source"])}],
            "properties": _properties({"role": part["role"], "documents": part["documents"]}),
        }


def _libraries(versions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for name, version in versions.items():
        if version != "absent" and name not in ("compress-toolkit", "python"):
            purl = f"pkg:pypi/{name.lower()}@{version}"
            yield {"bom-ref": purl, "type": "library", "name": name, "version": version, "purl": purl}


def _tool(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "application",
        "name": "compress-toolkit",
        "version": facts["versions"]["compress-toolkit"],
        "properties": _properties({"code_sha256": facts["code"]["sha256"]}),
    }


def _file(name: str, file: Mapping[str, Any]) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": file["sha256"]}]
    return {"type": "file", "name": name, "hashes": hashes, "properties": _properties({"bytes": file["bytes"]})}


def _properties(values: Mapping[str, object]) -> list[dict[str, str]]:
    return [{"name": f"compress:{key}", "value": str(v)} for key, v in values.items() if v is not None]
