"""The recipe: a YAML file as immutable, validated values, or one line that says what is wrong and where.

Plug-ins are validated through their own fields; torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress import plugin, yaml_nodes
from compress.errors import RecipeError
from compress.interfaces import Evaluator, Exporter, Plugin, Step
from compress.validation import shown, validated
from compress.yaml_nodes import Document, apply_set, dotted
from compress.yaml_nodes import Path as YamlPath

P = TypeVar("P", bound=Plugin)

MAX_BYTES = 4 * yaml_nodes.MAX_CHARACTERS
NAMED_SOURCES = ("wiki", "pydoc")
PREFIXED_SOURCES = ("file:", "hub:")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataSource(_Frozen):
    """Where text comes from, and tokens per window. How much of it a gate reads is the checks' affair."""

    source: str
    length: int = Field(512, ge=2)

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        prefixed = any(source.startswith(p) and len(source) > len(p) for p in PREFIXED_SOURCES)
        if not prefixed and source not in NAMED_SOURCES:
            known = [*NAMED_SOURCES, "file:PATH", "hub:NAME"]
            raise ValueError(f"no such source; {plugin.nearest(source, known)}")
        return source


class Calibration(DataSource):
    """What steps may look at, in tokens (null = all); limited by default, as a step's time grows with it."""

    source: str = "wiki"
    tokens: int | None = Field(32768, ge=1)


class Selection(DataSource):
    """What early stopping and search may look at, in tokens (null = all); gates never do."""

    source: str = "wiki"
    tokens: int | None = Field(65536, ge=1)


class Data(_Frozen):
    """The disjoint uses of text. holdout: what the final model alone sees, once; see `compress.holdout`."""

    calibration: Calibration = Calibration()
    selection: Selection = Selection()
    evaluation: tuple[DataSource, ...] = Field((DataSource(source="wiki"),), min_length=1)
    holdout: DataSource | None = None

    @field_validator("evaluation")
    @classmethod
    def _distinct(cls, sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        if len({s.source for s in sources}) < len(sources):
            raise ValueError("a source is listed twice")
        return sources


class StepEntry(_Frozen):
    """A step with its alternatives, and the checks that judge whichever is tried.

    gate: the default gate with the step's own checks merged in. gate_off: default checks switched off.
    """

    step: Step
    otherwise: tuple[Step, ...] = ()
    gate: tuple[Evaluator, ...] = ()
    gate_off: tuple[str, ...] = ()

    @property
    def attempts(self) -> tuple[Step, ...]:
        """The step and its alternatives in order; a check uses its alpha divided by their number."""
        return (self.step, *self.otherwise)


class ExportEntry(_Frozen):
    """An exporter and the release checks, with its own merged in, that its artifact must pass."""

    exporter: Exporter
    gate: tuple[Evaluator, ...]
    gate_off: tuple[str, ...] = ()


class _Head(_Frozen):
    """The recipe's plain fields."""

    model: str = Field(min_length=1)
    device: Literal["cpu"] = "cpu"  # no other is implemented: naming one is refused, not ignored
    dtype: Literal["float32", "bfloat16"] = "float32"
    streaming: bool = False  # the model's blocks stay on disk, one in memory at a time
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data = Data()


class Recipe(_Head):
    """A validated recipe. name: the file's stem. places: a path in the YAML → where it was written.

    Two recipes are equal when they resolve to the same text, wherever they were read from.
    """

    release: tuple[Evaluator, ...] = Field(min_length=1)
    gate: tuple[Evaluator, ...] = ()
    steps: tuple[StepEntry, ...] = Field(min_length=1)
    export: tuple[ExportEntry, ...] = ()
    name: str = "recipe"
    places: dict[YamlPath, str] = Field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, source: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a file (a Path), or in YAML text (a str); see `compress.recipe.load`."""
        return load(source, overrides)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    def __hash__(self) -> int:
        return hash(json.dumps(self.resolved(), sort_keys=True))

    def place(self, *path: str | int) -> str:
        """Where `path`, or the nearest thing that encloses it, was written: "recipe.yaml:14:5"."""
        prefixes = (path[:length] for length in range(len(path), -1, -1))
        return next((self.places[p] for p in prefixes if p in self.places), self.name)

    def checks(self) -> list[Evaluator]:
        """Every check of the release, of the steps and of the exports, in this order."""
        gates = [self.release, *(entry.gate for entry in self.steps), *(entry.gate for entry in self.export)]
        return [check for gate in gates for check in gate]

    def resolved(self) -> dict[str, Any]:
        """The canonical recipe as plain values with every default; loading it gives an equal recipe."""
        return {
            **self.model_dump(mode="json", include=set(_Head.model_fields)),
            "release": _checks(self.release),
            "gate": _checks(self.gate),
            "steps": [_resolved_step(entry) for entry in self.steps],
            "export": [{**_plain(e.exporter), "gate": _checks(e.gate, e.gate_off)} for e in self.export],
        }

    def to_yaml(self) -> str:
        """`resolved` as YAML text."""
        from io import StringIO

        from ruamel.yaml import YAML

        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.allow_unicode = True
        yaml.dump(self.resolved(), out := StringIO())
        return out.getvalue()


def load(source: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file (a Path) or in YAML text (a str), after the `--set` overrides.

    Raises RecipeError, one line with line and column, for the first thing that is wrong.
    """
    if isinstance(source, Path):
        document = yaml_nodes.parse(_read(source), source.name)
        name = source.name.removesuffix(".yaml").removesuffix(".yml")
    else:
        document, name = yaml_nodes.parse(source, "recipe.yaml"), "recipe"
    for assignment in overrides:
        apply_set(document, assignment)
    return _Builder(document).recipe(name)


def find(name_or_path: str) -> Path:
    """The file of a recipe: an existing path, or a recipe shipped with `compress` by its name."""
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
        folder = path.is_dir()
    except (OSError, ValueError):  # a name too long for a file, or with a NUL
        folder = False
    if folder:
        raise RecipeError(f"{name_or_path} is a folder, expected a recipe file or a shipped recipe's name")
    shipped = _shipped()
    stem = name_or_path.removesuffix(".yaml")
    if stem not in shipped:
        raise RecipeError(f"no file and no shipped recipe {name_or_path!r}; {plugin.nearest(stem, [*shipped])}")
    return shipped[stem]


def schema() -> dict[str, Any]:
    """JSON Schema of recipes with every known step, check and exporter, for editors."""
    from compress.recipe_schema import recipe_schema

    return recipe_schema(_Head)


def shipped() -> dict[str, str]:
    """Names of the shipped recipes, each with the first line of its comment."""
    found = {}
    for name, path in _shipped().items():
        first = path.read_text(encoding="utf-8").splitlines()[:1]
        found[name] = "".join(first).lstrip("# ").strip()
    return found


def _shipped() -> dict[str, Path]:
    package = Path(__file__).parent
    folder = package / "_recipes"  # in a wheel
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"  # editable: beside the package
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise RecipeError(f"{path}: no such file")
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes; a recipe has at most {MAX_BYTES}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None


def _plain(entry: Plugin) -> dict[str, Any]:
    return {entry.name: entry.model_dump(mode="json")}


def _checks(gate: Sequence[Evaluator], off: Sequence[str] = ()) -> list[dict[str, Any]]:
    return [*map(_plain, gate), *({name: "off"} for name in off)]


def _resolved_step(entry: StepEntry) -> dict[str, Any]:
    found = {**_plain(entry.step), "gate": _checks(entry.gate, entry.gate_off)}
    if entry.otherwise:
        found["otherwise"] = [_plain(step) for step in entry.otherwise]
    return found


class _Builder:
    """Builds the typed recipe from a document, naming the place of whatever does not fit."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def recipe(self, name: str) -> Recipe:
        root = self._mapping(self.document.value, (), "the recipe")
        known = [*_Head.model_fields, "release", "gate", "steps", "export"]
        for key in root:
            if key not in known:
                raise self._error((key,), f"unknown key {key!r}; {plugin.nearest(key, known)}", key=True)
        head = validated(self.document, _Head, {k: v for k, v in root.items() if k in _Head.model_fields}, (), "recipe")
        release = self._switched_on(root.get("release"), ("release",), cumulative=True)
        if not release:
            raise self._error(("release",), "release: found no check, expected at least one margin to prove")
        default = () if root.get("gate") == "off" else self._switched_on(root.get("gate", []), ("gate",))
        steps = self._items(root.get("steps"), ("steps",))
        if not steps:
            raise self._error(("steps",), "steps: found no step, expected at least one")
        gate = default if "gate" in root else None
        exports = enumerate(self._items(root.get("export", []), ("export",)))
        return Recipe(
            **dict(head),
            release=release,
            gate=default,
            steps=tuple(self._step(item, ("steps", i), gate) for i, item in enumerate(steps)),
            export=tuple(self._export(item, ("export", i), release) for i, item in exports),
            name=name,
            places={**self.document.values, **self.document.keys},
        )

    def _step(self, item: Any, path: YamlPath, default: tuple[Evaluator, ...] | None) -> StepEntry:
        label = f"steps[{path[-1]}]"
        step = self._step_alone(item, path, label, beside=("gate", "otherwise"))
        if default is None and "gate" not in item:
            raise self._error(path, f"{label} {step.name}: no gate judges it; give the step or the recipe a `gate`")
        gate, off = self._merged(default or (), item.get("gate", []), (*path, "gate"))
        attempts = item.get("otherwise", [])
        if "otherwise" in item and not attempts:
            raise self._error((*path, "otherwise"), f"{label}: `otherwise` lists no alternative", key=True)
        otherwise = tuple(
            self._step_alone(attempt, (*path, "otherwise", j), f"{label} otherwise[{j}]", beside=())
            for j, attempt in enumerate(self._items(attempts, (*path, "otherwise")))
        )
        return StepEntry(step=step, otherwise=otherwise, gate=gate, gate_off=off)

    def _step_alone(self, item: Any, path: YamlPath, label: str, beside: Sequence[str]) -> Step:
        name, fields = self._named(item, path, "step", label, beside)
        return validated(
            self.document, self._class(plugin.step, name, (*path, name), label), fields, (*path, name), label
        )

    def _export(self, item: Any, path: YamlPath, release: tuple[Evaluator, ...]) -> ExportEntry:
        label = f"export[{path[-1]}]"
        name, fields = self._named(item, path, "exporter", label, beside=("gate",))
        kind = self._class(plugin.exporter, name, (*path, name), label)
        exporter = validated(self.document, kind, fields, (*path, name), label)
        gate, off = self._merged(release, item.get("gate", []), (*path, "gate"), cumulative=True)
        if not gate:
            raise self._error((*path, "gate"), f"{label} {name}: found no check, expected at least one", key=True)
        return ExportEntry(exporter=exporter, gate=gate, gate_off=off)

    def _gate(self, items: Any, path: YamlPath) -> dict[str, Evaluator | None]:
        """Check name → evaluator, or None where it is `off`."""
        found: dict[str, Evaluator | None] = {}
        for i, item in enumerate(self._items(items, path)):
            label = f"{dotted(path)}[{i}]"
            name, fields = self._named(item, (*path, i), "evaluator", label, beside=())
            kind = self._class(plugin.evaluator, name, (*path, i, name), label)
            if name in found:
                raise self._error((*path, i, name), f"{label}: {name} is listed twice", key=True)
            found[name] = None
            if fields != "off":
                found[name] = validated(self.document, kind, fields, (*path, i, name), label)
        return found

    def _merged(
        self, default: tuple[Evaluator, ...], own: Any, path: YamlPath, cumulative: bool = False
    ) -> tuple[tuple[Evaluator, ...], tuple[str, ...]]:
        """The default checks, each replaced whole by the own check of its name, then the further own ones.

        The second tuple names the default checks that are `off`, one by one or all at once.
        """
        checks: dict[str, Evaluator | None] = {check.name: check for check in default}
        if own == "off":
            return (), tuple(checks)
        for i, (name, check) in enumerate(self._gate(own, path).items()):
            if check is None and name not in checks:
                hint = plugin.nearest(name, [*checks]) if checks else "there is none"
                message = f"{dotted(path)}[{i}]: {name} is off, but is no default check; {hint}"
                raise self._error((*path, i, name), message)
            if cumulative:
                self._against_baseline(check, (*path, i, name))
            checks[name] = check
        off = tuple(name for name, check in checks.items() if check is None)
        return tuple(check for check in checks.values() if check is not None), off

    def _switched_on(self, items: Any, path: YamlPath, cumulative: bool = False) -> tuple[Evaluator, ...]:
        """The checks of a list that others inherit: there is nothing yet that `off` could remove."""
        checks = self._gate(items, path)
        for i, (name, check) in enumerate(checks.items()):
            if check is None:
                message = f"{dotted(path)}[{i}]: {name} is off where it is first listed; leave it out"
                raise self._error((*path, i, name), message)
            if cumulative:
                self._against_baseline(check, (*path, i, name))
        return tuple(check for check in checks.values() if check is not None)

    def _against_baseline(self, check: Evaluator | None, path: YamlPath) -> None:
        """Measured against the parent, a release check would let losses add up unseen."""
        if check is not None and check.against != "baseline":
            message = f"{dotted(path)}.against: found {check.against}, expected baseline: the margin is cumulative"
            raise self._error((*path, "against"), message)

    def _named(self, item: Any, path: YamlPath, kind: str, label: str, beside: Sequence[str]) -> tuple[str, Any]:
        """The name and fields of a one-key mapping, which may have the keys `beside` it."""
        names = [key for key in item if key not in beside] if isinstance(item, dict) else []
        known = plugin.names(kind)
        if len(names) == 1:
            return names[0], item[names[0]]
        if not isinstance(item, dict):
            hint = f"; write {item}: {{}}" if item in known else ""
            expected = f"expected a mapping from one {kind}'s name to its fields"
            raise self._error(path, f"{label}: found {shown(item)}, {expected}{hint}")
        if not names:
            raise self._error(path, f"{label}: names no {kind}; known: {', '.join(known)}")
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None and len(names) == 2:
            hint = plugin.nearest(unknown, [*beside]) if beside else "an entry has no other keys"
            raise self._error((*path, unknown), f"{label}: unknown key {unknown!r}; {hint}", key=True)
        found = " and ".join(map(repr, names))
        message = f"{label}: found {found}, expected one {kind} per entry; start each with `-`"
        raise self._error((*path, names[1]), message, key=True)

    def _class(self, lookup: Callable[[str], type[P]], name: str, path: YamlPath, label: str) -> type[P]:
        try:
            return lookup(name)
        except RecipeError as error:
            raise self._error(path, f"{label}: {error}", key=True) from None

    def _items(self, value: Any, path: YamlPath) -> list[Any]:
        if isinstance(value, list):
            return value
        problem = f"found {shown(value)}, expected a list" if path in self.document.values else "is required"
        raise self._error(path, f"{dotted(path)}: {problem}")

    def _mapping(self, value: Any, path: YamlPath, label: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        raise self._error(path, f"{label}: found {shown(value)}, expected a mapping")

    def _error(self, path: YamlPath, message: str, key: bool = False) -> RecipeError:
        return RecipeError(f"{self.document.place(path, key)}  {message}")
