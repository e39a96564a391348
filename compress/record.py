"""The types of run.json; its JSON Schema is generated from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.assay import Assay
from compress.decisions import Verdict
from compress.errors import Corrupt, RecipeError
from compress.gate import CheckResult, Figure, GateResult
from compress.holdout import Holdout
from compress.interfaces import Aspect
from compress.noise import Noise
from compress.zeros import Zeros

FILE = "run.json"
SCHEMA = "compress.run/1"
Status = Literal["passed", "failed", "inconclusive", "error"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metric(_Record):
    """A figure of one model with its 95 % interval over documents."""

    metric: str
    unit: str
    source: str
    value: Figure
    interval: tuple[Figure, Figure]
    examples: int
    tokens: int
    definition: str
    aspect: Aspect = "quality"
    against: dict[str, Figure] | None = None  # loss, lower, upper, where a reference was given


class Baseline(_Record):
    """The model that losses are measured against."""

    model: str
    digest: str
    size_bytes: int
    metrics: list[Metric]


class Attempt(_Record):
    """One try of a step, accepted or not."""

    name: str
    params: dict[str, Any]
    verdict: Verdict | Literal["UNGATED"]
    checks: list[CheckResult]
    seconds: float
    cached: bool
    size_bytes: int
    bits_per_weight: float
    notes: list[str]
    unchanged: bool = False  # every stored tensor is its parent's, bit for bit


class StepRecord(_Record):
    """A step as accepted, or as last tried; `attempts` holds every try in order, this one last."""

    name: str
    params: dict[str, Any]
    parent: str
    digest: str
    cached: bool
    seconds: float
    peak_rss_bytes: int
    parameters: int
    size_bytes: int
    bits_per_weight: float
    gate: GateResult | None
    gate_off: list[str]
    notes: list[str]
    attempts: list[Attempt]
    unchanged: bool = False
    layer_errors: dict[str, Figure] = Field(default_factory=dict)  # linear → ‖y − y'‖² / ‖y‖², where accepted
    encodings: dict[str, str] = Field(default_factory=dict)  # linear or embedding → encoding, where accepted


class FileRecord(_Record):
    """A file of an export."""

    name: str
    bytes: int
    sha256: str


class ExportRecord(_Record):
    """An exported artifact; `path` is relative to the run's folder, and empty while nothing is published.

    size_bytes: of the files that the runtime reads. files: once published, also those that describe them.
    """

    format: str
    params: dict[str, Any]
    path: str
    files: list[FileRecord]
    size_bytes: int
    bits_per_weight: float
    runtime: str
    weights_exact: bool
    compute: str
    seconds: float
    gate: GateResult
    zeros: Zeros | None = None  # what they bring the file, where weights were pruned


class RunRecord(_Record):
    """Everything that `apply` did."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: str = Field(SCHEMA, alias="schema")
    recipe: str
    key: str
    status: Status = "error"
    exit_code: int = 1
    error: str | None = None
    versions: dict[str, str]
    host: dict[str, str | int]
    data: list[dict[str, Any]] = Field(default_factory=list)
    baseline: Baseline | None = None
    assays: list[Assay] = Field(default_factory=list)
    noise: list[Noise] = Field(default_factory=list)  # of the baseline's own scores, asked twice
    steps: list[StepRecord] = Field(default_factory=list)
    release: GateResult | None = None
    holdout: Holdout | None = None  # of the final model, where the recipe keeps one
    exports: list[ExportRecord] = Field(default_factory=list)

    def to_json(self) -> str:
        """As written to run.json: strict JSON, non-finite figures as null."""
        return self.model_dump_json(by_alias=True, indent=1)


def read(path: Path) -> tuple[RunRecord, Path]:
    """The record of a run, given its folder or its run.json; and that folder.

    Raises RecipeError where there is none, Corrupt where it is not one.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"{path}: no {FILE} here; give the folder of a run, or its {FILE}")
    try:
        record = RunRecord.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise Corrupt(f"{file}: {place}: {first['msg']}") from None
    if record.schema_ != SCHEMA:
        raise Corrupt(f"{file}: schema {record.schema_!r}, expected {SCHEMA!r}")
    return record, file.parent


def schema() -> dict[str, Any]:
    """JSON Schema of run.json."""
    found = RunRecord.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "compress run"}
