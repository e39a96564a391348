"""The plan: what is knowable of a recipe before weights load, size, time, memory and the power of its gates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress import holdout, machine
from compress.architectures import Facts
from compress.data import Split, split
from compress.decisions import minimum_detectable
from compress.encodings import Encoding
from compress.interfaces import Documents, Evaluator, Step
from compress.recipe import Recipe, StepEntry
from compress.recipe_data import evaluation, requests
from compress.refusals import check, check_documents
from compress.scarcity import scarcity

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
    **dict.fromkeys(
        ("accuracy", "robustness", "stereotypes", "pronouns", "text", "code", "classification", "refusals", "toxicity"),
        math.sqrt(FLIPS),
    ),
}
POWER_BASIS = (
    "80 % power at one look, with a standard deviation per document between those of int8 and int4 rounding "
    f"(perplexity {PLANNING_SD['perplexity']}, divergence {PLANNING_SD['divergence']} nats per token, wiki; "
    f"bits_per_byte {PLANNING_SD['bits_per_byte']:.3f}, perplexity's at {CHARACTERS_PER_TOKEN} bytes a token); "
    f"accuracy: {FLIPS:.0%} of answers flip, a document being a cluster of items, those that first prove the "
    "baseline counted too; robustness, stereotypes, pronouns, text, code, classification, refusals and toxicity as "
    "accuracy"
)
MOST_NEEDED = 1_000_000  # documents; a check that needs more is as good as undecidable

# Floating point operations per second of a forward pass in float32 on two cores of a server.
FLOPS = 1.5e11
BANDWIDTH = 1e10  # bytes of weights per second: a written token reads them all; 540 MB took 60 ms on one core
GATE_DOCUMENTS = 200  # a clear verdict takes 50 to 200
LIBRARY_BYTES = 600_000_000

SIZE_BASIS = (
    "codes, scales and zero points of every matrix, other matrices and norms in float32; of each pruned matrix a mask "
    "besides, a bit for every weight, which the bits per weight leave out and no export holds; no file headers"
)
TIME_BASIS = (
    f"an estimate: 2 operations per weight and token at {FLOPS:.1e} per second (float32, two cores); "
    "calibration counts 3 forward passes, 6 where gradients choose, training 4; a gate's model and reference each see "
    f"{GATE_DOCUMENTS} documents of every source; each token that one writes reads all weights once; "
    "release, exports and the losses planted beforehand are not counted"
)
MEMORY_BASIS = (
    f"an upper estimate: libraries ({LIBRARY_BYTES / 1e6:.0f} MB), float32 weights of the model and of its "
    "reference, the larger of a gate's logits of one window of both (of one, where it is long) and of what calibration "
    "takes: two Hessians of the widest input, or those that a step solves with at once and the largest four times "
    "more, and float32 states of all tokens before and after a block, with what lies free between them (twice where a "
    "copy of the model is fitted to; for quantize.gptq the inputs of its linears, too); gradients and two moments of "
    "every weight where a step trains, another copy of the weights where one fits them to the residual stream, and "
    "where gradients choose, what one window leaves behind for them in every block, its logits thrice, half of the "
    "weights, and what the step keeps of them"
)


@dataclass(frozen=True)
class Text:
    """How much text a role of a source holds; tokens are estimated from characters."""

    role: str
    source: str
    documents: int
    tokens: float


def describe(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """The plan as data: predicted sizes, estimates of time and memory, and the power of each check.

    Reads the recipe's data, and raises RecipeError where they overlap or are missing; loads no weights.
    """
    warnings = check(recipe, facts)
    parts = split(requests(recipe), recipe.seed)
    check_documents(recipe, facts, parts)
    texts, datasets = _texts(parts), evaluation(parts)
    stored = {name: Encoding("fp32") for name in facts.matrices}
    masked: set[str] = set()
    baseline, steps = _size(facts, stored), []
    now, tokens = facts, _calibration_tokens(texts)
    for i, entry in enumerate(recipe.steps):
        steps.append(_describe_step(recipe, now, entry, stored, masked, texts, datasets))
        scarce = {step.name: said for step in entry.attempts if (said := scarcity(step, now, tokens))}
        warnings += [f"steps[{i}] {name}: about {said}" for name, said in scarce.items()]
        warnings += _power_warnings(f"steps[{i}] {entry.step.name}", steps[-1]["checks"])
        stored |= entry.step.encodings(now)
        masked |= entry.step.masked(now)
        now = entry.step.facts_after(now)
    release = _powers(recipe.release, 1, datasets)
    warnings += [*_memory_warning(recipe, facts, tokens), *_dtype_warning(recipe)]
    held: list[dict[str, Any]] = []
    if recipe.data.holdout is not None:  # its first use; each further one proves less
        held = _powers(holdout.checks(recipe)[0], holdout.attempts(1), evaluation(parts, "holdout"))
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "parameters": facts.parameters,
        "baseline": baseline,
        "steps": steps,
        "release": release,
        "holdout": held,
        "exports": [{"format": e.exporter.name, "params": e.exporter.model_dump(mode="json")} for e in recipe.export],
        "basis": {"size": SIZE_BASIS, "seconds": TIME_BASIS, "memory": MEMORY_BASIS, "power": POWER_BASIS},
        "warnings": warnings + _power_warnings("release", release) + _power_warnings("holdout", held),
    }


def _describe_step(
    recipe: Recipe,
    facts: Facts,
    entry: StepEntry,
    stored: Mapping[str, Encoding],
    masked: set[str],
    texts: Sequence[Text],
    datasets: Sequence[Documents],
) -> dict[str, Any]:
    tokens = _calibration_tokens(texts)
    sizes = [
        _size(step.facts_after(facts), {**stored, **step.encodings(facts)}, masked | step.masked(facts))
        for step in entry.attempts
    ]
    return {
        "name": entry.step.name,
        "params": entry.step.model_dump(mode="json"),
        **sizes[0],
        "seconds_estimate": _step_seconds(entry.step, facts, texts),
        "gate_seconds_estimate": _gate_seconds(entry, facts, datasets),
        "memory_bytes_estimate": _memory_bytes(recipe, facts, entry, tokens),
        "checks": _powers(entry.gate, len(entry.attempts), datasets),
        "gate_off": list(entry.gate_off),
        "otherwise": [{"name": step.name, **size} for step, size in zip(entry.otherwise, sizes[1:])],
    }


def _texts(parts: Sequence[Split]) -> list[Text]:
    """What the recipe's data hold, in documents and roughly in tokens."""
    found = []
    for part in parts:
        request, documents = part.request, len(part.documents)
        tokens = sum(len(d.text) for d in part.documents) / CHARACTERS_PER_TOKEN
        share = 1.0 if request.tokens is None else min(1.0, request.tokens / tokens)
        found.append(Text(request.role, request.source, max(1, int(documents * share)), tokens * share))
    return found


def _calibration_tokens(texts: Sequence[Text]) -> float:
    return sum(t.tokens for t in texts if t.role == "calibration")


def _size(facts: Facts, stored: Mapping[str, Encoding], masked: Collection[str] = ()) -> dict[str, Any]:
    """Predicted size_bytes and bits_per_weight of matrices in these encodings, and the rest in float32.

    masked: the tensors with a mask, which counts towards the bytes alone, as in `compress.artifact`.
    """
    bits = 32.0 * facts.floats + sum(n * m * stored[name].bits_per_weight(m) for name, (n, m) in facts.matrices.items())
    masks = sum(math.ceil(math.prod(facts.matrices[name]) / 8) for name in masked)
    return {"size_bytes": round(bits / 8) + masks, "bits_per_weight": bits / (facts.parameters + facts.floats)}


def _forward_seconds(facts: Facts, tokens: float) -> float:
    return 2 * facts.parameters * tokens / FLOPS


def _step_seconds(step: Step, facts: Facts, texts: Sequence[Text]) -> float | None:
    """Of the step alone; None where it trains and states no budget in tokens."""
    if step.recovers:
        budget = getattr(step, "tokens", None)
        return _forward_seconds(facts, 4 * budget) if isinstance(budget, int) else None
    calibration = _calibration_tokens(texts)
    passes = 6 if step.gradient_bytes(facts) else 3
    return _forward_seconds(facts, passes * calibration if step.uses_calibration else 0)


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


def _memory_bytes(recipe: Recipe, facts: Facts, entry: StepEntry, tokens: float = 0) -> int:
    """Of one step and its gate; tokens: of the calibration data."""
    weights = 4 * facts.parameters
    if recipe.streaming:  # one matrix outside the blocks, a block, and as much again while it is read or rounded
        blocks = sum(n * m for n, m in facts.linears.values())
        outside = facts.matrices.keys() - {f"{name}.weight" for name in facts.linears}
        weights = 4 * (max(math.prod(facts.matrices[name]) for name in outside) + 2 * blocks // facts.layers)
    longest = max(request.length for request in requests(recipe))
    rows = max(2 * longest, *(c.window for c in (*entry.gate, *recipe.release)))  # a fixed set is read by one at a time
    total = LIBRARY_BYTES + 2 * weights
    total += max(4 * rows * facts.vocabulary, *(_calibration_bytes(step, facts, tokens) for step in entry.attempts))
    if any(step.recovers for step in entry.attempts):
        total += 3 * weights
    if any(step.twins for step in entry.attempts):
        total += weights
    if kept := max(step.gradient_bytes(facts) for step in entry.attempts):
        residual, mlp = facts.sizes["residual"], facts.sizes["mlp"]
        left = facts.layers * (8 * residual + 5 * mlp) + 3 * facts.vocabulary  # per token: 49 kB a block, measured
        total += weights // 2 + 4 * longest * left + kept
    return total


def _calibration_bytes(step: Step, facts: Facts, tokens: float) -> int:
    """Second moments and states of calibration tokens; gone before a gate computes logits."""
    if not step.uses_calibration:
        return 0
    squares = [m**2 for m in step.hessians(facts).values()] or [0]
    moments = max(sum(squares) + 4 * max(squares), 2 * max(m for _, m in facts.linears.values()) ** 2)
    return round(4 * moments + (2 if step.twins else 1) * step.state_bytes(facts, tokens))


def _memory_warning(recipe: Recipe, facts: Facts, tokens: float = 0) -> Iterator[str]:
    """Where this machine has less memory available than the recipe may take."""
    _, available = machine.memory()
    needed = max(_memory_bytes(recipe, facts, entry, tokens) for entry in recipe.steps)
    if needed > available:
        less = "" if recipe.streaming else "; `streaming: true` keeps one block of the model in memory"
        yield f"up to {needed / 1e9:.1f} GB of memory are needed, and {available / 1e9:.1f} GB are available{less}"


def _dtype_warning(recipe: Recipe) -> Iterator[str]:
    """Where gates are to multiply in a type that this processor has not."""
    if recipe.dtype != "bfloat16":
        return
    from compress.numerics.products import multiplies_bfloat16

    if not multiplies_bfloat16():
        yield "dtype: this processor multiplies no bfloat16, which takes some eight times as long as float32"


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
