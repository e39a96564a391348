"""JSON Schema of recipes, generated from the recipe's types and from every known plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from compress import plugin
from compress.interfaces import Plugin


def recipe_schema(head: type[BaseModel]) -> dict[str, Any]:
    """The schema of a recipe whose plain fields are `head`'s."""
    steps = {name: plugin.step(name) for name in plugin.names("step")}
    evaluators = {name: plugin.evaluator(name) for name in plugin.names("evaluator")}
    exporters = {name: plugin.exporter(name) for name in plugin.names("exporter")}
    kinds: list[type[BaseModel]] = [head, *steps.values(), *evaluators.values(), *exporters.values()]
    found, shared = models_json_schema([(kind, "validation") for kind in kinds], title="compress recipe")
    refs = {kind: found[kind, "validation"] for kind in kinds}
    gate = {"anyOf": [{"const": "off"}, {"type": "array", "items": _one_of(evaluators, refs, {}, off=True)}]}
    attempt = _one_of(steps, refs, {})
    beside = {"gate": gate, "otherwise": {"type": "array", "items": attempt, "minItems": 1}}
    lists = {
        "release": {"type": "array", "items": _one_of(evaluators, refs, {}), "minItems": 1},
        "gate": {"anyOf": [{"const": "off"}, {"type": "array", "items": _one_of(evaluators, refs, {})}]},
        "steps": {"type": "array", "items": _one_of(steps, refs, beside), "minItems": 1},
        "export": {"type": "array", "items": _one_of(exporters, refs, {"gate": gate})},
    }
    definitions = dict(shared["$defs"])
    plain = definitions.pop(refs[head]["$ref"].rsplit("/", 1)[-1])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress recipe",
        "type": "object",
        "properties": {**plain["properties"], **lists},
        "required": [*plain.get("required", []), "release", "steps"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _one_of(
    plugins: Mapping[str, type[Plugin]],
    refs: Mapping[type[BaseModel], Any],
    beside: Mapping[str, Any],
    off: bool = False,
) -> dict[str, Any]:
    """An entry: exactly one plug-in's name with its fields, and the keys `beside` it.

    Null stands for no fields where none is required; `off` admits that word too.
    """
    names: dict[str, Any] = {}
    for name, kind in plugins.items():
        optional = not any(field.is_required() for field in kind.model_fields.values())
        others = [{"type": "null"}] * optional + [{"const": "off"}] * off
        names[name] = {"anyOf": [refs[kind], *others]}
    return {
        "type": "object",
        "properties": {**names, **beside},
        "additionalProperties": False,
        "oneOf": [{"required": [name]} for name in names],
    }
