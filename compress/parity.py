"""Whether an artifact's runtime computes what was gated: against the torch model, and against itself when it decodes.

Deterministic properties of kernels and files, not estimates: no interval is due. Equal weights do not make equal
logits, so what is allowed depends on how coarsely the runtime computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.decisions import compare
from compress.families import Encoder, EncoderDecoder
from compress.gate import CheckResult
from compress.interfaces import Documents, Inspectable, LanguageModel, Progress
from compress.labels import labels_of
from compress.pairs import paired, prompt_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.model import Model

VERSION = 3
DOCUMENTS = 12
TOKENS = 64  # per document, enough to cross several attention blocks
GENERATED, PROMPT = 64, 16  # tokens that the gated model writes, after so many of a document
MARGIN = 0.01  # nats per token: kernels for one token and for many may round activations differently
_UNIT = "standard deviations of a row of logits"


@dataclass(frozen=True)
class Tolerance:
    """Largest mean and largest single difference of logits, in standard deviations of their row.

    tokens: largest share of written tokens that differ. state: relative difference of the residual stream, in the
    Frobenius norm, from which on a layer counts as differing.
    """

    mean: float
    most: float
    tokens: float
    state: float


# By what activations become before they are multiplied, or keys and values before they are cached.
TOLERANCES = {
    "float32": Tolerance(mean=1e-4, most=5e-3, tokens=0.02, state=1e-3),
    "float16": Tolerance(mean=5e-3, most=0.2, tokens=0.05, state=0.02),
    "bfloat16": Tolerance(mean=0.05, most=1.0, tokens=0.1, state=0.1),
    "int8": Tolerance(mean=0.15, most=2.0, tokens=0.3, state=0.5),
}


def precision(*computes: str) -> str:
    """The coarsest precision that descriptions of computing name.

    >>> precision("Q4_0 + F32 weights, int8 + float32 activations, float16 cache", "float32 weights, float32 products")
    'int8'
    """
    phrases = re.findall(r"([\w +]+) (?:activations|products|cache)", " ".join(f"{c}," for c in computes))
    named = {word for phrase in phrases for word in re.split(r"[ +]+", phrase)}
    return [kind for kind in TOLERANCES if kind in named][-1]


def parity_checks(
    opened: LanguageModel,
    gated: Model,
    datasets: Sequence[Documents],
    progress: Progress = lambda label, fraction: None,
) -> list[CheckResult]:
    """An artifact in its runtime against the model that it was made from, on the first documents of each source.

    Mean and largest difference of logits per source, the mean KL(gated‖artifact) among the details of the first;
    and how many of the tokens that the gated model writes, if it writes, the artifact would have written too. Where one
    fails, its definition says where the models part, if the runtime tells.
    """
    tolerance = TOLERANCES[precision(opened.compute, gated.compute)]
    checks, worst = [], (-1.0, list[int]())
    for data in datasets:
        found = _differences(opened, gated, data, progress)
        tokens = sum(len(d.window) for d in found)
        mean = sum(d.mean * len(d.window) for d in found) / tokens if tokens else float("nan")
        largest = max((d.most for d in found), default=float("nan"))
        worst = max([worst, *((d.mean, d.window) for d in found)], key=lambda pair: pair[0])
        shown = len(found), tokens
        average = _check(
            "parity", data, mean, tolerance.mean, *shown, "mean difference of logits from the gated model's"
        )
        rows = sum(d.rows for d in found)
        if rows and math.isfinite(kl := sum(d.kl for d in found) / rows):
            average = average.model_copy(update={"details": {"kl": kl}})
        checks += [
            average,
            _check(
                "parity_max",
                data,
                largest,
                tolerance.most,
                *shown,
                "largest difference of logits from the gated model's",
            ),
        ]
    if datasets and not gated.labels:
        checks.append(_written(opened, gated, datasets[0], tolerance.tokens))
    if any(c.verdict != "PASS" for c in checks) and worst[1]:
        where = _parting(opened, gated, worst[1], tolerance.state)
        checks = [
            c if c.verdict == "PASS" else c.model_copy(update={"definition": f"{c.definition} {where}"}) for c in checks
        ]
    return checks


@dataclass(frozen=True)
class _Difference:
    """Of a document's logits: mean and largest, in standard deviations, and the sum of KL over its rows in nats."""

    window: list[int]
    mean: float
    most: float
    kl: float
    rows: int


def _differences(opened: LanguageModel, gated: Model, data: Documents, progress: Progress) -> list[_Difference]:
    """How the logits of every document differ."""
    from compress.numerics.divergence import divergence

    windows = [window for _, text in data.documents[:DOCUMENTS] if (window := _window(opened, text, TOKENS))]
    found = []
    for i, window in enumerate(windows):
        expected = next(gated.logits([window]))
        logits = next(opened.logits([window]))
        difference = (logits - expected).abs() / expected.std(dim=1, keepdim=True)
        kl = float(divergence(expected, logits).kl.sum())
        found.append(_Difference(window, float(difference.mean()), float(difference.max()), kl, len(expected)))
        progress(f"parity on {data.source}", (i + 1) / len(windows))
    return found


def _window(model: LanguageModel, text: str, tokens: int) -> list[int]:
    """The first tokens of a text; a pair whole."""
    window = model.encode(text)
    return window if paired(model) else window[:tokens]


def _prompt(opened: LanguageModel, gated: Model, text: str) -> list[int]:
    """What the gated model goes on with: a beginning, or a source with the start of a target."""
    window = _window(opened, text, PROMPT)
    return prompt_of(gated, window) if paired(gated) else window


def _written(opened: LanguageModel, gated: Model, data: Documents, margin: float) -> CheckResult:
    """Tokens that the gated model writes greedily, each against the artifact's choice after the same beginning."""
    same, total, prompts = 0, 0, 0
    for _, text in data.documents[:DOCUMENTS]:
        prompt = _prompt(opened, gated, text)
        if not prompt or total >= GENERATED:
            continue
        tokens = gated.generate(prompt, min(GENERATED - total, gated.context_length - len(prompt)))
        choices = opened.decode_logits([*prompt, *tokens[:-1]])[-len(tokens) :].argmax(dim=1).tolist()
        same += sum(a == b for a, b in zip(tokens, choices, strict=True))
        total, prompts = total + len(tokens), prompts + 1
    share = 1 - same / total if total else float("nan")
    meaning = "share of the tokens written by the gated model that the artifact, decoding, would not write"
    return _check("parity_tokens", data, share, margin, prompts, total, meaning)


def _check(
    metric: str, data: Documents, loss: float, margin: float, examples: int, tokens: int, meaning: str
) -> CheckResult:
    written = metric == "parity_tokens"
    result = _exact(metric, "share of tokens" if written else _UNIT, data, loss, margin, examples, tokens)
    definition = f"{meaning}{'' if written else f', in {_UNIT}'}; deterministic, so without an interval."
    return result.model_copy(update={"against": "the gated model", "definition": definition})


def _exact(
    metric: str, unit: str, data: Documents, loss: float, margin: float, examples: int, tokens: int
) -> CheckResult:
    """A deterministic loss against its margin: bounds and value are the loss itself."""
    return CheckResult(
        metric=metric,
        unit=unit,
        source=data.source,
        against="prefill",
        reference=0.0,
        value=loss,
        loss=loss,
        lower=loss,
        upper=loss,
        margin=margin,
        confidence=1.0,
        examples=examples,
        tokens=tokens,
        verdict=compare(loss, loss, margin),
        definition="",
    )


def _parting(opened: LanguageModel, gated: Model, window: Sequence[int], tolerance: float) -> str:
    """Where the two models part, from the outputs of all norms along the residual stream."""
    if not isinstance(opened, Inspectable):
        name = opened.runtime.partition(" ")[0]
        return f"Where the two part is not known: {name} shows no intermediate outputs."
    norms, behind = _norms(gated.facts)
    pairs = zip(gated.norm_outputs(norms, window), opened.norm_outputs(norms, window), strict=True)
    for module, (expected, found) in zip(behind, pairs, strict=True):
        difference = _relative(expected, found)
        if not difference <= tolerance:
            return (
                f"The two part in {module}: its relative difference is {difference:.2g}, and {tolerance:g} is allowed."
            )
    return f"The two agree up to the last norm, and part in {gated.facts.architecture.head}."


def _norms(facts: Facts) -> tuple[list[str], list[str]]:
    """Every norm along the residual stream, and for each the module whose output it is the first to see."""
    parts = facts.architecture
    if isinstance(parts, EncoderDecoder):
        return _norms_of_halves(facts, parts)
    norms, behind = list[str](), [parts.embedding]
    for i in range(facts.layers):
        block = f"{parts.blocks}.{i}"
        norms += [f"{block}.{name}" for name in parts.block_norms]
        behind += [f"{block}.{parts.attention}", f"{block}.mlp"]
    norms.append(parts.final_norm)
    if isinstance(parts, Encoder):  # its norms stand behind each part, and the first behind the embeddings
        norms = behind = [norms[-1], *norms[:-1]]
    return norms, behind


def _norms_of_halves(facts: Facts, parts: EncoderDecoder) -> tuple[list[str], list[str]]:
    """The encoder's, then the decoder's, whose first one sees the embedding again."""
    norms, behind = list[str](), list[str]()
    halves = (
        (parts.encoder_blocks, facts.encoder_layers, parts.encoder_norms, parts.encoder_final_norm),
        (parts.blocks, facts.layers, parts.block_norms, parts.final_norm),
    )
    for blocks, layers, names, final in halves:
        own = [f"{blocks}.{i}.{name}" for i in range(layers) for name in names]
        norms += [*own, final]
        behind += [parts.embedding, *(name.rpartition(".")[0] for name in own)]
    return norms, behind


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def decode_check(
    model: LanguageModel, datasets: Sequence[Documents], progress: Progress = lambda label, fraction: None
) -> list[CheckResult]:
    """Mean KL(prefill‖decode) per token of one model with itself, on the first documents of each source.

    A deterministic property of the runtime's kernels, not an estimate: no interval is due. None of a model that has no
    next token to decode.
    """
    return [] if labels_of(model) else [_on_source(model, data, progress) for data in datasets]


def _on_source(model: LanguageModel, data: Documents, progress: Progress) -> CheckResult:
    from compress.numerics.divergence import divergence

    total, agree, tokens = 0.0, 0.0, 0
    documents = data.documents[:DOCUMENTS]
    for i, (_, text) in enumerate(documents):
        window = _window(model, text, TOKENS)
        if len(window) < 2:
            continue
        at_once = next(model.logits([window])).clone()
        found = divergence(at_once, model.decode_logits(window))
        total, agree = total + float(found.kl.sum()), agree + float(found.agree.sum())
        tokens += len(window)
        progress(f"decode on {data.source}", (i + 1) / len(documents))
    mean = total / tokens if tokens else float("nan")
    result = _exact("decode", "nats per token", data, mean, MARGIN, len(documents), tokens)
    definition = (
        "mean KL(prefill‖decode): logits of one pass against token-by-token decoding through the "
        "key-value cache, same runtime and weights; deterministic, so without an interval."
    )
    details = {"top1": agree / tokens} if tokens else {}
    return result.model_copy(update={"definition": definition, "details": details})
