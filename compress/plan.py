"""The plan: what is knowable of a recipe before weights load. Refuses what cannot work, predicts the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress import machine
from compress.architectures import Facts
from compress.data import Request, Split, split
from compress.decisions import minimum_detectable
from compress.encodings import Encoding
from compress.errors import RecipeError
from compress.interfaces import Documents, Evaluator, Exporter, Step
from compress.recipe import Recipe, StepEntry

CHARACTERS_PER_TOKEN = 4.5  # of English text under vocabularies of 30,000 to 150,000 tokens

# Standard deviation over documents of (loss - margin * tokens) / mean tokens, in nats per token. It grows
# with the loss. Measured on SmolLM2-135M, 60 documents of wiki, rounding to nearest, group size 32, margins
# 5 % and 0.08: int8 (loss 0.002) 0.023 and 0.041, int4 (loss 0.25) 0.155 and 0.147; here the geometric means.
# Accuracy: the items of a cluster are taken to flip together, so that its deviation is that of one item.
FLIPS = 0.10  # of items, both ways; rounding SmolLM2-135M to int8 flips 3 of 340 minimal pairs and 0 of 60 cloze items
PLANNING_SD: Mapping[str, float] = {
    "perplexity": 0.06,
    "divergence": 0.08,
    "bits_per_byte": 0.06 / (math.log(2) * CHARACTERS_PER_TOKEN),
    **dict.fromkeys(("accuracy", "robustness", "stereotypes", "pronouns", "text"), math.sqrt(FLIPS)),
}
POWER_BASIS = (
    "80 % power at one look, with a standard deviation per document between those of int8 and int4 rounding "
    f"(perplexity {PLANNING_SD['perplexity']}, divergence {PLANNING_SD['divergence']} nats per token, wiki; "
    f"bits_per_byte {PLANNING_SD['bits_per_byte']:.3f}, perplexity's at {CHARACTERS_PER_TOKEN} bytes a token); "
    f"accuracy: {FLIPS:.0%} of answers flip, a document being a cluster of items, those that first prove the "
    "baseline counted too; robustness, stereotypes, pronouns and text as accuracy"
)
MOST_NEEDED = 1_000_000  # documents; a check that needs more is as good as undecidable

# Floating point operations per second of a forward pass in float32 on two cores of a server.
FLOPS = 1.5e11
BANDWIDTH = 1e10  # bytes of weights per second: a written token reads them all; 540 MB took 60 ms on one core
GATE_DOCUMENTS = 200  # a clear verdict takes 50 to 200
LIBRARY_BYTES = 600_000_000

SIZE_BASIS = "codes, scales and zero points of every matrix, other matrices and norms in float32; no file headers"
TIME_BASIS = (
    f"an estimate: 2 operations per weight and token at {FLOPS:.1e} per second (float32, two cores); "
    "calibration counts 3 forward passes, training 4; a gate's model and reference each see "
    f"{GATE_DOCUMENTS} documents of every source; each token that one writes reads all weights once; "
    "release, exports and the losses planted beforehand are not counted"
)
MEMORY_BASIS = (
    f"an upper estimate: libraries ({LIBRARY_BYTES / 1e6:.0f} MB), float32 weights of the model and of its "
    "reference, logits of one window of both (of one, where it is long), two Hessians of the widest input where "
    "calibration is used, gradients and two moments of every weight where a step trains, another copy of the weights "
    "where one fits them to the residual stream"
)


@dataclass(frozen=True)
class Text:
    """How much text a role of a source holds; tokens are estimated from characters."""

    role: str
    source: str
    documents: int
    tokens: float


def requests(recipe: Recipe) -> list[Request]:
    """What a recipe asks of its data: calibration, selection, then each evaluation source."""
    data = recipe.data
    return [
        Request("calibration", data.calibration.source, data.calibration.tokens, data.calibration.length),
        Request("selection", data.selection.source, data.selection.tokens, data.selection.length),
        *(Request("evaluation", s.source, None, s.length) for s in data.evaluation),
    ]


def check(recipe: Recipe, facts: Facts) -> list[str]:
    """Warnings about the recipe on a model of these facts; raises RecipeError for what cannot work.

    Every attempt is judged, since any of them may be the one that ships.
    """
    shapes = _shapes(recipe, facts)
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            for before in shapes[i]:
                _check_step(recipe, before, path, step)
            _check_order(recipe, shapes[i], i, path, step)
        _check_margins(recipe, i, entry)
    if recipe.streaming:
        _check_streaming(recipe)
    _check_measurements(recipe, facts)
    _check_rounded_once(recipe, shapes)
    _check_refined(recipe, shapes)
    _check_exports(recipe, shapes)
    return [*_loosened(recipe), *_ungated(recipe)]


def describe(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """The plan as data: predicted sizes, estimates of time and memory, and the power of each check.

    Reads the recipe's data, and raises RecipeError where they overlap or are missing; loads no weights.
    """
    warnings = check(recipe, facts)
    parts = split(requests(recipe), recipe.seed)
    texts, datasets = _texts(parts), evaluation(parts)
    stored = {name: Encoding("fp32") for name in facts.matrices}
    baseline, steps = _size(facts, stored), []
    now = facts
    for i, entry in enumerate(recipe.steps):
        steps.append(_describe_step(recipe, now, entry, stored, texts, datasets))
        warnings += _power_warnings(f"steps[{i}] {entry.step.name}", steps[-1]["checks"])
        stored |= entry.step.encodings(now)
        now = entry.step.facts_after(now)
    release = _powers(recipe.release, 1, datasets)
    warnings += _memory_warning(recipe, facts)
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "parameters": facts.parameters,
        "baseline": baseline,
        "steps": steps,
        "release": release,
        "exports": [{"format": e.exporter.name, "params": e.exporter.model_dump(mode="json")} for e in recipe.export],
        "basis": {"size": SIZE_BASIS, "seconds": TIME_BASIS, "memory": MEMORY_BASIS, "power": POWER_BASIS},
        "warnings": warnings + _power_warnings("release", release),
    }


def _describe_step(
    recipe: Recipe,
    facts: Facts,
    entry: StepEntry,
    stored: Mapping[str, Encoding],
    texts: Sequence[Text],
    datasets: Sequence[Documents],
) -> dict[str, Any]:
    sizes = [_size(step.facts_after(facts), {**stored, **step.encodings(facts)}) for step in entry.attempts]
    return {
        "name": entry.step.name,
        "params": entry.step.model_dump(mode="json"),
        **sizes[0],
        "seconds_estimate": _step_seconds(entry.step, facts, texts),
        "gate_seconds_estimate": _gate_seconds(entry, facts, datasets),
        "memory_bytes_estimate": _memory_bytes(recipe, facts, entry),
        "checks": _powers(entry.gate, len(entry.attempts), datasets),
        "gate_off": list(entry.gate_off),
        "otherwise": [{"name": step.name, **size} for step, size in zip(entry.otherwise, sizes[1:])],
    }


def _attempts(entry: StepEntry, i: int) -> Iterator[tuple[tuple[str | int, ...], Step]]:
    """Each attempt with its path in the recipe, up to the step's name."""
    yield ("steps", i, entry.step.name), entry.step
    for j, step in enumerate(entry.otherwise):
        yield ("steps", i, "otherwise", j, step.name), step


def _shapes(recipe: Recipe, facts: Facts) -> list[list[Facts]]:
    """Before each step, and after the last, the facts that the model may have by then: any attempt may be accepted."""
    found = [[facts]]
    for entry in recipe.steps:
        after: list[Facts] = []
        for before in found[-1]:
            for step in entry.attempts:
                left = step.facts_after(before)
                after += [left] if left not in after else []
        found.append(after)
    return found


def _encodings(step: Step, shapes: Sequence[Facts]) -> dict[str, Encoding]:
    """What the step stores on a model of any of these facts."""
    return {name: encoding for facts in shapes for name, encoding in step.encodings(facts).items()}


def _title(path: Sequence[str | int]) -> str:
    """("steps", 1, "otherwise", 0, "quantize.rtn") as `steps[1] otherwise[0] quantize.rtn`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f" {part}" for part in path).lstrip()


def _refusal(recipe: Recipe, path: Sequence[str | int], message: str) -> RecipeError:
    return RecipeError(f"{recipe.place(*path)}  {_title(path)}: {message}")


def _check_step(recipe: Recipe, facts: Facts, path: tuple[str | int, ...], step: Step) -> None:
    """The step's own judgement, and group sizes that must divide the input channels."""
    try:
        step.check(facts)
        for name, encodings in step.possible(facts).items():
            for encoding in encodings:
                encoding.groups(facts.matrices[name][1])
    except RecipeError as error:
        raise _refusal(recipe, path, str(error)) from None


def _check_order(recipe: Recipe, shapes: Sequence[Facts], i: int, path: tuple[str | int, ...], step: Step) -> None:
    """Codes are final: nothing may train, prune or round them again. Masks and codes fix the shapes."""
    for k, earlier in enumerate(recipe.steps[:i]):
        holding = next((attempt for attempt in earlier.attempts if attempt.packs or attempt.masks), None)
        if step.reshapes and holding is not None:
            held = "stored the weights in an encoding" if holding.packs else "pruned single weights"
            message = f"changes shapes after steps[{k}] {holding.name} has {held}; move it before steps[{k}]"
            raise _refusal(recipe, path, message)
        rounding = next((a for a in earlier.attempts if a.cache() or any(a.inputs(facts) for facts in shapes)), None)
        if step.recovers and rounding is not None:
            message = f"trains after steps[{k}] {rounding.name} rounds what the model computes, which has no gradient"
            raise _refusal(recipe, path, f"{message}; move it before steps[{k}]")
        if pruning := next((attempt for attempt in earlier.attempts if attempt.masks), None):
            _check_zeros(recipe, path, step, shapes, f"steps[{k}] {pruning.name}")
        packing = next((attempt for attempt in earlier.attempts if attempt.packs), None)
        if packing is None:
            continue
        before = f"steps[{k}] {packing.name} has stored the weights in an encoding"
        # A step that both trains and packs knows how to train around codes.
        if step.recovers and not step.packs:
            raise _refusal(recipe, path, f"trains after {before}; move it before steps[{k}]")
        if step.masks:
            raise _refusal(recipe, path, f"prunes after {before}; move it before steps[{k}]")


def _check_zeros(
    recipe: Recipe, path: tuple[str | int, ...], step: Step, shapes: Sequence[Facts], pruning: str
) -> None:
    """An encoding without a zero would resurrect pruned weights."""
    chosen = ((name, e) for facts in shapes for name, some in step.possible(facts).items() for e in some)
    for name, encoding in chosen:
        if not encoding.holds_zero:
            message = f"{name}: {encoding} holds no zero, and {pruning} has pruned weights; use int4 or mxfp4"
            raise _refusal(recipe, path, message)


def _check_rounded_once(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> None:
    """Tensors in codes cannot be rounded again."""
    coded: dict[str, int] = {}
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            twice = [name for name in _encodings(step, shapes[i]) if name in coded]
            if twice:
                first = f"stored as codes by steps[{coded[twice[0]]}] already"
                remedy = "leave them to one step (keep: fp32, embeddings: null)"
                raise _refusal(recipe, path, f"{twice[0]} and {len(twice) - 1} more are {first}; {remedy}")
        for step in entry.attempts:
            coded |= {name: i for name, e in _encodings(step, shapes[i]).items() if e.is_coded}


def _check_refined(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> None:
    """What refines codes needs some, whichever attempts are accepted before it."""

    def stores(entry: StepEntry, facts: Sequence[Facts]) -> bool:
        return all(any(e.is_coded for e in _encodings(step, facts).values()) for step in entry.attempts)

    for i, entry in enumerate(recipe.steps):
        stored = any(stores(*pair) for pair in zip(recipe.steps[:i], shapes))
        for path, step in _attempts(entry, i):
            if step.refines and not stored:
                message = "refines weights stored in codes, and no earlier step stores some in every attempt"
                raise _refusal(recipe, path, f"{message}; quantize before it")


def _check_margins(recipe: Recipe, i: int, entry: StepEntry) -> None:
    """A loss that a step may have and the release may not must be won back by a later step."""
    if any(step.recovers for later in recipe.steps[i + 1 :] for step in later.attempts):
        return
    release = {c.name: c for c in recipe.release}
    for c in entry.gate:
        final = release.get(c.name)
        # An exact quantity, a size, may still shrink; a parent's margin is another quantity after step 0.
        if final is None or c.statistic == "exact" or (c.against == "parent" and i > 0):
            continue
        if c.margin > final.margin:
            margins = f"its gate lets {c.name} lose {c.display(c.margin)}, release {c.display(final.margin)}"
            remedy = "tighten the gate, or add a step that trains after this one"
            message = f"{margins}, and no later step recovers quality; {remedy}"
            raise _refusal(recipe, ("steps", i, entry.step.name), message)


def _check_streaming(recipe: Recipe) -> None:
    """What reads a model out of order, or holds all of it, has no place where one block is in memory."""
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            if not step.streams:
                message = "streaming: this step needs the whole model in memory; the steps quantize.rtn, gptq, awq, hqq"
                raise _refusal(recipe, path, f"{message}, smoothquant and cast do not")
    for i, export in enumerate(recipe.export):
        if not export.exporter.streams:
            message = "streaming: this format is written from the whole model in memory; export to gguf"
            raise _refusal(recipe, ("export", i, export.exporter.name), message)
    for path, gate in _gates(recipe):
        if writing := next((c for c in gate if c.written and path[0] != "export"), None):
            message = f"streaming: {writing.name} writes token by token, and each would read every block from disk"
            raise _refusal(recipe, path, f"{message}; move it to the gate of an export")


def _check_measurements(recipe: Recipe, facts: Facts) -> None:
    for request in requests(recipe):
        if request.length > facts.context_length:
            problem = f"length={request.length} exceeds the model's context of {facts.context_length} tokens"
            place = recipe.place("data", request.role)
            raise RecipeError(f"{place}  data.{request.role}: {problem}")
    for path, gate in _gates(recipe):
        for c in gate:
            if c.timed and path[0] != "export":
                problem = "times artifacts in their runtimes, and this gate sees a model in torch"
                raise _refusal(recipe, path, f"{c.name}: {problem}; move it to the gate of an export")
            if c.window > facts.context_length:
                problem = f"windows of {c.window} tokens exceed the model's context of {facts.context_length} tokens"
                raise _refusal(recipe, path, f"{c.name}: {problem}")


def _gates(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], Sequence[Evaluator]]]:
    """Every gate with its path in the recipe."""
    yield ("release",), recipe.release
    yield from ((("steps", i), entry.gate) for i, entry in enumerate(recipe.steps))
    yield from ((("export", i), entry.gate) for i, entry in enumerate(recipe.export))


def _possible(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> dict[str, dict[Encoding, str]]:
    """Tensor name → every encoding that it may end in, with the attempt that would store it."""
    found = {name: {Encoding("fp32"): "no step"} for facts in shapes[0] for name in facts.matrices}
    for i, entry in enumerate(recipe.steps):
        after: dict[str, dict[Encoding, str]] = {name: {} for name in found}
        for path, step in _attempts(entry, i):
            stored: dict[str, dict[Encoding, str]] = {}
            for facts in shapes[i]:
                for name, encodings in step.possible(facts).items():
                    stored.setdefault(name, {}).update(dict.fromkeys(encodings, _title(path)))
            for name, before in found.items():
                after[name].update(stored.get(name, before))
        found = after
    return {name: found[name] for facts in shapes[-1] for name in facts.matrices}


def _check_exports(recipe: Recipe, shapes: Sequence[Sequence[Facts]]) -> None:
    possible = _possible(recipe, shapes)
    for i, entry in enumerate(recipe.export):
        path = ("export", i, entry.exporter.name)
        try:
            for facts in shapes[-1]:
                entry.exporter.check(facts)
        except RecipeError as error:
            raise _refusal(recipe, path, str(error)) from None
        for name, encodings in possible.items():
            for encoding, origin in encodings.items():
                if reason := entry.exporter.refuses(encoding, name):
                    raise _refusal(recipe, path, f"{reason} (stored by {origin})")
        for reason in _unrounded(recipe, shapes, entry.exporter):
            raise _refusal(recipe, path, reason)


def _unrounded(recipe: Recipe, shapes: Sequence[Sequence[Facts]], exporter: Exporter) -> Iterator[str]:
    """What some attempt lets the gated model round while it runs, and the exporter's runtime would not."""
    for i, entry in enumerate(recipe.steps):
        for path, step in _attempts(entry, i):
            if (cache := step.cache()) and (reason := exporter.refuses_cache(cache)):
                yield f"{reason} (by {_title(path)})"
            for facts in shapes[i]:
                stored = step.encodings(facts)
                for linear, rounding in step.inputs(facts).items():
                    if reason := exporter.refuses_inputs(rounding, stored[f"{linear}.weight"], linear):
                        yield f"{reason} (by {_title(path)})"


def _loosened(recipe: Recipe) -> Iterator[str]:
    """Exports whose own margins are wider than the release's, or that leave a release check out."""
    release = {c.name: c for c in recipe.release}
    for i, entry in enumerate(recipe.export):
        label = f"export[{i}] {entry.exporter.name}"
        for c in entry.gate:
            if c.name in release and c.statistic != "exact" and c.margin > release[c.name].margin:
                wider = f"{c.display(c.margin)}, release {c.display(release[c.name].margin)}"
                yield f"{label}: {c.name} may lose {wider}"
        yield from (f"{label}: {name} is off" for name in entry.gate_off)


def _ungated(recipe: Recipe) -> Iterator[str]:
    for i, entry in enumerate(recipe.steps):
        label = f"steps[{i}] {entry.step.name}"
        yield from (f"{label}: {name} is off" for name in entry.gate_off)
        if not entry.gate:
            yield f"{label}: no check judges this step alone, and its alternatives can never be tried"


def evaluation(parts: Sequence[Split]) -> list[Documents]:
    """The evaluation sources among the parts of a recipe's data, in gate order."""
    return [
        Documents(p.request.source, [(d.id, d.text) for d in p.documents], p.digest, p.request.length)
        for p in parts
        if p.request.role == "evaluation"
    ]


def _texts(parts: Sequence[Split]) -> list[Text]:
    """What the recipe's data hold, in documents and roughly in tokens."""
    found = []
    for part in parts:
        request, documents = part.request, len(part.documents)
        tokens = sum(len(d.text) for d in part.documents) / CHARACTERS_PER_TOKEN
        share = 1.0 if request.tokens is None else min(1.0, request.tokens / tokens)
        found.append(Text(request.role, request.source, max(1, int(documents * share)), tokens * share))
    return found


def _size(facts: Facts, stored: Mapping[str, Encoding]) -> dict[str, Any]:
    """Predicted size_bytes and bits_per_weight of matrices in these encodings, and norms in float32."""
    norms = (facts.layers * len(facts.architecture.block_norms) + 1) * facts.sizes["residual"]
    bits = 32.0 * norms + sum(n * m * stored[name].bits_per_weight(m) for name, (n, m) in facts.matrices.items())
    return {"size_bytes": round(bits / 8), "bits_per_weight": bits / (facts.parameters + norms)}


def _forward_seconds(facts: Facts, tokens: float) -> float:
    return 2 * facts.parameters * tokens / FLOPS


def _step_seconds(step: Step, facts: Facts, texts: Sequence[Text]) -> float | None:
    """Of the step alone; None where it trains and states no budget in tokens."""
    if step.recovers:
        budget = getattr(step, "tokens", None)
        return _forward_seconds(facts, 4 * budget) if isinstance(budget, int) else None
    calibration = sum(t.tokens for t in texts if t.role == "calibration")
    return _forward_seconds(facts, 3 * calibration if step.uses_calibration else 0)


def _gate_seconds(entry: StepEntry, facts: Facts, datasets: Sequence[Documents]) -> float:
    """Of one attempt's gate, model and reference, when it looks at `GATE_DOCUMENTS` documents of a source.

    Checks on the same documents share their forward passes.
    """
    sources = [(c, d) for c in entry.gate if c.statistic != "exact" for d in c.foreseen(datasets)]
    known = [(c, d) for c, d in sources if isinstance(d, Documents)]
    looked_at = {id(d): d for _, d in known}
    characters = sum(len(text) for d in looked_at.values() for _, text in d.documents[:GATE_DOCUMENTS])
    written = sum(c.written * len(d.documents) for c, d in known)
    reading = _forward_seconds(facts, 2 * characters / CHARACTERS_PER_TOKEN)
    return reading + 2 * written * 4 * facts.parameters / BANDWIDTH


def _memory_bytes(recipe: Recipe, facts: Facts, entry: StepEntry) -> int:
    weights = 4 * facts.parameters
    if recipe.streaming:  # embeddings, a block, and as much again while it is read or rounded
        blocks = sum(n * m for n, m in facts.linears.values())
        weights = 4 * (facts.parameters - blocks + 2 * blocks // facts.layers)
    longest = max(request.length for request in requests(recipe))
    rows = max(2 * longest, *(c.window for c in (*entry.gate, *recipe.release)))  # a fixed set is read by one at a time
    total = LIBRARY_BYTES + 2 * weights + 4 * rows * facts.vocabulary
    if any(step.uses_calibration for step in entry.attempts):
        total += 2 * 4 * max(m for _, m in facts.linears.values()) ** 2
    if any(step.recovers for step in entry.attempts):
        total += 3 * weights
    if any(getattr(step, "update", None) == "stream" for step in entry.attempts):
        total += weights
    return total


def _memory_warning(recipe: Recipe, facts: Facts) -> Iterator[str]:
    """Where this machine has less memory available than the recipe may take."""
    _, available = machine.memory()
    needed = max(_memory_bytes(recipe, facts, entry) for entry in recipe.steps)
    if needed > available:
        less = "" if recipe.streaming else "; `streaming: true` keeps one block of the model in memory"
        yield f"up to {needed / 1e9:.1f} GB of memory are needed, and {available / 1e9:.1f} GB are available{less}"


def _powers(gate: Sequence[Evaluator], attempts: int, datasets: Sequence[Documents]) -> list[dict[str, Any]]:
    """Per check and source, the smallest distance from the margin that it resolves at 80 % power."""
    return [
        _power(c, attempts, data) for c in gate for data in (c.foreseen(datasets) if c.statistic != "exact" else [None])
    ]


def _power(c: Evaluator, attempts: int, data: Documents | str | None) -> dict[str, Any]:
    """`resolves` is None where no planning value is known, or where too few documents can ever decide.

    data: None for files, the name alone where the documents are not known, and `documents` is None.

    `lossless` is the number of documents with which a model without any loss passes at 80 % power. A fixed
    set has no sampling error: it resolves every loss.
    """
    found: dict[str, Any] = {"metric": c.name, "unit": c.unit, "margin": c.margin, "confidence": c.confidence}
    found |= {"source": "files", "documents": 0, "needs": 0, "resolves": 0.0, "lossless": 0}
    if data is None:
        return found
    sd = PLANNING_SD.get(c.name)
    shown = {"needs": c.minimum_examples, "margin_shown": c.display(c.margin)}
    lossless = None if sd is None else _lossless(c, sd, attempts)
    if isinstance(data, str):
        unknown = {"source": data, "documents": None, "resolves": None, "resolves_shown": None, "lossless": lossless}
        return found | unknown | shown
    documents = min(len(data.documents), c.max_documents or len(data.documents))
    if c.statistic == "census":
        return found | shown | {"source": data.source, "documents": documents, "resolves_shown": c.display(0.0)}
    resolves = None if sd is None else minimum_detectable(c, documents, sd, attempts)
    if resolves == math.inf:
        resolves = None
    return found | {
        **shown,
        "source": data.source,
        "lossless": lossless,
        "documents": documents,
        "resolves": resolves,
        "resolves_shown": None if resolves is None else c.display(resolves),
    }


def _lossless(c: Evaluator, sd: float, attempts: int) -> int | None:
    """Fewest documents that resolve the whole margin; more always resolve more. None beyond `MOST_NEEDED`."""
    low, high = c.minimum_examples - 1, MOST_NEEDED
    if minimum_detectable(c, high, sd, attempts) > c.margin:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if minimum_detectable(c, middle, sd, attempts) <= c.margin else (middle, high)
    return high


def _power_warnings(label: str, powers: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for p in powers:
        if p["documents"] is None:
            found.append(
                f"{label}: {p['metric']} on {p['source']}: the documents are not here, and plan downloads nothing"
            )
            continue
        where = f"{label}: {p['metric']} on {p['source']}, {p['documents']} documents"
        if p["documents"] < p["needs"]:
            found.append(f"{where}: at least {p['needs']} are needed, so it can only end inconclusive")
        elif p["resolves"] is not None and p["resolves"] > p["margin"]:
            resolves = f"resolves {p['resolves_shown']} at 80 % power, more than its margin of {p['margin_shown']}"
            found.append(f"{where}: {resolves}; add documents or widen the margin")
    return found
