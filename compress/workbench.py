"""The workbench of a run: the models that are open, what the store remembers, and the gates over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import artifact, assay, data, environment, inspection, noise, recipe_data, source
from compress.assay import Assay
from compress.errors import Corrupt, RecipeError
from compress.gate import Gate, GateResult, Sizes
from compress.interfaces import Documents, Evaluator, Progress
from compress.measure import measure
from compress.noise import Noise
from compress.plugin import evaluator
from compress.provenance.facts import shown
from compress.recipe import Recipe
from compress.record import Baseline, Metric
from compress.store import Store, key_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model, Recalled


@dataclass(frozen=True)
class Reporter:
    """Where a run tells what it is doing: `say` a line, `progress` a fraction."""

    say: Callable[[str], None] = lambda line: None
    progress: Progress = lambda label, fraction: None


@dataclass
class Workbench:
    """What the parts of a run share. baseline: the artifact that losses are measured against, once opened."""

    recipe: Recipe
    store: Store
    reporter: Reporter
    source: source.Source
    splits: Sequence[data.Split]
    baseline: Path = Path()
    assays: dict[str, list[Assay]] = field(default_factory=dict)  # settings of a check → its assays
    noises: dict[str, list[Noise]] = field(default_factory=dict)  # settings of a check but its margin → its noise
    _open: dict[str, Model] = field(default_factory=dict)  # artifact path → model, the latest two
    _recalled: dict[str, Recalled] = field(default_factory=dict)  # by digest: a baseline is closed and opened again

    def open_baseline(self) -> Baseline:
        """Open the recipe's model, or the store's copy of it, and measure its own figures.

        Raises Corrupt where its files changed while they were read: the copy would not be what its key says.
        """
        digest = source.digest(self.source)
        facts: dict[str, Any] = {"baseline": digest, "versions": environment.step_versions()}
        key = key_of({**facts, "streaming": True} if self.recipe.streaming else facts)
        known = self.store.made(key)
        self.baseline = known[0] if known else self._copy(key, digest)
        self._assay()  # first: it scores the documents of the baseline's figures
        self._measure_noise()
        return Baseline(
            model=self.recipe.model,
            digest=artifact.digest(self.baseline),
            size_bytes=artifact.manifest(self.baseline)["size_bytes"],
            metrics=[] if self._labels else [self._baseline_metric(documents) for documents in self.evaluation()],
        )

    def _copy(self, key: str, digest: str) -> Path:
        """A copy of the recipe's model in the store. digest: of its files, which they must still have in the end."""
        self.reporter.say(f"opening {self.recipe.model}")
        model = source.load_from(self.source, self.recipe.dtype, self.recipe.streaming)
        folder = self.store.save(model, key)
        same = artifact.manifest(folder)["model_digest"] == model.digest
        model.close()
        if source.digest(self.source) != digest or not same:
            what = "files changed while they were read" if same else "copy in the store is of another model"
            error = Corrupt(f"model {self.recipe.model}: its {what}; run again")
            self.store.quarantine(folder, error)
            raise error
        self.store.remember(key, {})
        return folder

    @property
    def _labels(self) -> tuple[str, ...]:
        """Classes that the recipe's model tells apart; none of a language model."""
        return source.facts(self.source).labels

    def _baseline_metric(self, documents: Documents) -> Metric:
        perplexity = evaluator("perplexity").model_construct()  # measures, and needs no margin
        some = replace(documents, documents=documents.documents[: assay.DOCUMENTS])

        def compute() -> Any:
            model = self.model(self.baseline)
            return measure(perplexity, model, some, cache=self.store, progress=self.progress("baseline")).model_dump(
                mode="json"
            )

        facts = {"metric": "perplexity", "model": artifact.digest(self.baseline), **self.conditions(some)}
        return Metric.model_validate(self.recorded({**facts, "documents": assay.DOCUMENTS}, compute))

    def _assay(self) -> None:
        """Plant a loss for every check of the recipe, unless the store knows what came of it."""
        checks = {_settings(c): c for c in reversed(self.recipe.checks()) if c.statistic not in ("exact", "census")}
        found = self._examined("assay", checks, assay.examine)
        self.assays = {name: [Assay.model_validate(a) for a in found[name]] for name in reversed(checks)}
        for a in [a for own in self.assays.values() for a in own if a.verdict == "MISSED"]:
            self.reporter.say(f"warning: {a.metric} on {a.source} means nothing here: {a.reason}")

    def _measure_noise(self) -> None:
        """What identical weights lose in every check of the recipe, once per host, dtype and versions."""
        checks = {_settings_of_noise(c): c for c in self.recipe.checks() if noise.applies(c)}
        found = self._examined("noise", checks, noise.measure)
        self.noises = {name: [Noise.model_validate(n) for n in found[name]] for name in checks}
        for check in {_settings(c): c for c in self.recipe.checks()}.values():
            for n, reason in self._below_noise(check):
                self.reporter.say(f"warning: {check.name} on {n.source} means nothing here: {reason}")

    def _examined(self, what: str, checks: dict[str, Evaluator], examine: Callable[..., Any]) -> dict[str, list[Any]]:
        """What `examine` finds out about checks on the baseline, each as plain values; from the store where known."""
        datasets = self.evaluation()
        facts = {"baseline": artifact.digest(self.baseline), **self.conditions(*datasets)}
        keys = {name: key_of({what: name, **facts}) for name in checks}
        found = {name: self.store.get(key) for name, key in keys.items()}
        missing = [name for name in checks if found[name] is None]
        if missing:
            chosen, baseline = [checks[name] for name in missing], self.model(self.baseline)
            made = examine(chosen, baseline, datasets, cache=self.store, progress=self.progress(what))
            for name, own in zip(missing, made, strict=True):
                found[name] = [a.model_dump(mode="json") for a in own]
                self.store.put(keys[name], found[name])
        return {name: own or [] for name, own in found.items()}

    def distrust(self, check: Evaluator, source: str) -> str:
        """Why a check of the recipe means nothing on a source, as assay or noise showed; empty where it does."""
        missed = [a.reason for a in self._missed(check) if a.source == source]
        return next(iter([*missed, *(reason for n, reason in self._below_noise(check) if n.source == source)]), "")

    def distrusted(self, checks: Sequence[Evaluator]) -> list[Any]:
        """All of these, as keys of caches hold them."""
        missed = [a.model_dump(mode="json") for check in checks for a in self._missed(check)]
        return missed + [[n.source, reason] for check in checks for n, reason in self._below_noise(check)]

    def _missed(self, check: Evaluator) -> list[Assay]:
        return [a for a in self.assays.get(_settings(check), []) if a.verdict == "MISSED"]

    def _below_noise(self, check: Evaluator) -> list[tuple[Noise, str]]:
        known = self.noises.get(_settings_of_noise(check), [])
        return [(n, reason) for n in known if (reason := noise.refusal(check, n))]

    def recorded(self, facts: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """A stored value by what determines it, computed where it is absent."""
        key = key_of(facts)
        found = self.store.get(key)
        if found is None:
            found = compute()
            self.store.put(key, found)
        return found

    def model(self, folder: Path) -> Model:
        """An artifact opened; the baseline stays, and one other."""
        from compress.model import Recalled

        name = str(folder)
        if name not in self._open:
            for other in [k for k in self._open if k != str(self.baseline)]:
                self._open.pop(other).close()
            try:
                self._open[name] = artifact.load(folder, self.recipe.dtype)
            except Corrupt as error:
                self.store.quarantine(folder, error)
                raise
            if folder == self.baseline:  # every gate asks it for the same documents
                opened = self._open[name]
                opened.recalled = self._recalled.setdefault(opened.digest, Recalled())
        return self._open[name]

    def close(self) -> None:
        """Release every open model; they open again when they are asked for."""
        for model in self._open.values():
            model.close()
        self._open.clear()

    def windows(self, role: str, model: Model) -> Sequence[Tensor]:
        """Packed windows of token ids for the steps: "calibration" or "selection"."""
        return _packed(self._part(role), model)

    def source_of(self, role: str) -> str:
        """The source of "calibration" or "selection" by its name alone, which files may tell others."""
        return shown(self._part(role).request.source)

    def _part(self, role: str) -> data.Split:
        (part,) = [s for s in self.splits if s.request.role == role]
        return part

    def layer_errors(self, folder: Path) -> dict[str, float | None]:
        """Each linear's error against the baseline on some of *selection*, to 4 digits; None is not finite.

        For reading, not for deciding: none where selection is too short to fill a window, which is said.
        """
        part = self._part("selection")
        length = min(inspection.TOKENS, part.request.length)
        request = replace(part.request, length=length, tokens=inspection.WINDOWS * length)

        def compute() -> Any:
            baseline = self.model(self.baseline)
            try:
                windows = _packed(replace(part, request=request), baseline)
            except RecipeError as error:
                self.reporter.say(f"  layer errors are not measured: {error}")
                return {}
            model = artifact.load(folder, self.recipe.dtype)
            found = inspection.layer_errors(model, baseline, windows, self.progress("inspect"))
            model.close()
            return {name: float(f"{x:.4g}") if math.isfinite(x) else None for name, x in found.items()}

        facts = {
            "layer_errors": [inspection.VERSION, part.digest, request.length, request.tokens],
            "model": artifact.digest(folder),
            "baseline": artifact.digest(self.baseline),
            **self.conditions(),
        }
        errors: dict[str, float | None] = self.recorded(facts, compute)
        return errors

    def evaluation(self) -> list[Documents]:
        """The evaluation sources, in gate order."""
        return recipe_data.evaluation(self.splits)

    def conditions(self, *datasets: Documents) -> dict[str, Any]:
        """What scores depend on besides the model and the check."""
        return {
            "data": [[d.source, d.digest, d.length] for d in datasets],
            "dtype": self.recipe.dtype,
            "host": environment.host(),
            "versions": environment.versions(),
        }

    def gate(
        self,
        checks: Sequence[Evaluator],
        folder: Path,
        parent: Path | None,
        label: str,
        attempts: int = 1,
        datasets: Sequence[Documents] = (),
    ) -> GateResult:
        """The verdict on an artifact against the baseline and, where a check asks for it, against its parent.

        datasets: what is looked at, by default the evaluation sources.
        """
        facts = artifact.manifest(folder)
        asked = parent if any(c.against == "parent" for c in checks) else None
        datasets = datasets or self.evaluation()

        def compute() -> Any:
            baseline = self.model(self.baseline)
            previous = artifact.load(asked, self.recipe.dtype) if asked else None
            model = artifact.load(folder, self.recipe.dtype)
            try:
                found = Gate(tuple(checks)).evaluate(
                    model,
                    baseline,
                    datasets,
                    parent=previous,
                    sizes=Sizes(facts["size_bytes"], facts["bits_per_weight"]),
                    attempts=attempts,
                    cache=self.store,
                    progress=self.progress(f"gate {label}"),
                    distrust=self.distrust,
                )
                return found.model_dump(mode="json")
            finally:
                model.close()

        facts_of_gate = {
            "gate": describe_checks(checks),
            "model": artifact.digest(folder),
            "baseline": artifact.digest(self.baseline),
            "parent": artifact.digest(asked) if asked else None,
            "attempts": attempts,
            "distrusted": self.distrusted(checks),
            **self.conditions(*datasets),
        }
        return GateResult.model_validate(self.recorded(facts_of_gate, compute))

    def progress(self, label: str) -> Progress:
        """Progress of a part, led by its label."""
        return lambda what, done: self.reporter.progress(f"{label}: {what}", done)


def describe_checks(checks: Sequence[Evaluator]) -> list[Any]:
    """What decides a gate's verdict besides the models: its checks, as keys of caches hold them."""
    return [[c.name, c.version, c.model_dump(mode="json"), c.reads()] for c in checks]


def _packed(part: data.Split, model: Model) -> list[Tensor]:
    """The part's documents as windows of equal length, each ended as the model ends a text; a classifier encodes that.

    A text behind another one in a window is not what a classifier reads in use, but its states are much alike. Pairs
    are a window each.
    """
    if model.facts.paired:
        return data.whole(part, model.encode)
    return data.pack(part, model.encode, None if model.labels else min(model.eos_ids, default=0))


def _settings(check: Evaluator) -> str:
    return key_of({"settings": assay.settings(check)})


def _settings_of_noise(check: Evaluator) -> str:
    return key_of({"settings": noise.settings(check)})
