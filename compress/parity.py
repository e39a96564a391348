"""Whether an artifact that decodes token by token computes what was gated in one pass over the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from compress.decisions import compare
from compress.gate import CheckResult
from compress.interfaces import Documents, LanguageModel, Progress

DOCUMENTS = 12
TOKENS = 64  # per document, enough to cross several attention blocks
MARGIN = 0.01  # nats per token: kernels for one token and for many may round activations differently


def decode_check(
    model: LanguageModel, datasets: Sequence[Documents], progress: Progress = lambda label, fraction: None
) -> list[CheckResult]:
    """Mean KL(prefill‖decode) per token of one model with itself, on the first documents of each source.

    A deterministic property of the runtime's kernels, not an estimate: no interval is due.
    """
    return [_on_source(model, data, progress) for data in datasets]


def _on_source(model: LanguageModel, data: Documents, progress: Progress) -> CheckResult:
    from compress.numerics.divergence import divergence

    total, agree, tokens = 0.0, 0.0, 0
    documents = data.documents[:DOCUMENTS]
    for i, (_, text) in enumerate(documents):
        window = model.encode(text)[:TOKENS]
        if len(window) < 2:
            continue
        at_once = next(model.logits([window])).clone()
        found = divergence(at_once, model.decode_logits(window))
        total, agree = total + float(found.kl.sum()), agree + float(found.agree.sum())
        tokens += len(window)
        progress(f"decode on {data.source}", (i + 1) / len(documents))
    mean = total / tokens if tokens else float("nan")
    return CheckResult(
        metric="decode",
        unit="nats per token",
        source=data.source,
        against="prefill",
        reference=0.0,
        value=mean,
        loss=mean,
        lower=mean,
        upper=mean,
        margin=MARGIN,
        confidence=1.0,
        examples=len(documents),
        tokens=tokens,
        verdict=compare(mean, mean, MARGIN),
        definition="mean KL(prefill‖decode): logits of one pass against token-by-token decoding through the "
        "key-value cache, same runtime and weights; deterministic, so without an interval.",
        details={"top1": agree / tokens} if tokens else {},
    )
