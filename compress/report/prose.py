"""The sentences of a report: what was compressed, what is proven about it, and how to read a verdict."""

from __future__ import annotations

from dataclasses import dataclass

from compress.report import figures
from compress.report.view import SEVERITY, Check, Report, Stage, worst

HOW_TO_READ = (
    "Every check scores the compressed model and its reference on the same examples, taken in a seeded "
    "random order, and bounds the mean loss from below and from above at the stated confidence; the bounds "
    "of sampled checks are asymptotic (exact for accuracy) and stay valid although the gate may stop as soon "
    "as the evidence is clear, and where a step has alternatives, the allowed error is divided among them beforehand. "
    "A fixed set is read whole: its loss is known without error, and nothing is claimed beyond the set.",
    "PASS: even the upper bound is within the margin. FAIL: even the lower bound is beyond it. "
    "INCONCLUSIVE: the margin lies between the two, so the data proved neither, or a gain is proven that is too "
    "large to be believed unseen. INVALID: the check itself could not be trusted, so nothing is claimed.",
)
STATUS_WORDS = {
    "passed": "Passed",
    "failed": "Failed",
    "inconclusive": "Inconclusive",
    "error": "Error",
}
_NAMES = {
    "perplexity": "perplexity",
    "divergence": "mean divergence",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "robustness": "accuracy under perturbation",
    "stereotypes": "preference for stereotypes",
    "pronouns": "answers that depend on gender",
    "text": "match with references",
    "generation": "collapsed generations",
    "long_context": "perplexity in long contexts",
    "latency": "time per token",
}


@dataclass(frozen=True)
class Claim:
    """One statement about a check, with the check that carries it."""

    check: Check
    stage: Stage
    text: str


def headline(report: Report) -> str:
    """The one sentence that a colleague reads."""
    if report.status == "passed":
        return _passed_headline(report)
    if report.status == "error":
        return f"{report.model}: the run stopped with an error"
    culprit = culprit_stage(report)
    if culprit is None:
        return f"{report.model}: {'not proven' if report.status == 'inconclusive' else 'not accepted'}"
    what = _names_of_offenders(culprit)
    if report.status == "inconclusive":
        return f"{report.model} was not published: {place(culprit)} could not prove its {what}"
    return f"{report.model} was not published: {place(culprit)} exceeds its {what}"


def _passed_headline(report: Report) -> str:
    before = report.baseline.size_bytes
    sizes = [(a.stage.size_bytes, a.stage.name) for a in report.artifacts if a.stage.size_bytes is not None]
    final = report.final()
    if not sizes and final is not None and final.size_bytes is not None:
        sizes = [(final.size_bytes, "")]
    if before is None or not sizes:
        return f"{report.model}: every gate passed"
    targets = figures.listed([f"{figures.size(s)}{f' as {name}' if len(sizes) > 1 else ''}" for s, name in sizes])
    return f"{report.model} compressed from {figures.size(before)} to {targets}"


def place(stage: Stage) -> str:
    """A stage as prose names it."""
    if stage.kind == "release":
        return "the final model"
    if stage.kind == "holdout":
        return "the final model on the sealed holdout"
    if stage.kind == "export":
        return f"the {stage.name} artifact"
    return f"step {stage.title}"


def culprit_stage(report: Report) -> Stage | None:
    """The stage that decided a run which did not pass: an artifact, the release or the last attempt."""
    late = [s for s in (*(a.stage for a in report.artifacts), report.holdout, report.release) if s is not None]
    for stage in sorted(late, key=lambda s: SEVERITY.get(s.verdict, 9)):
        if stage.verdict in SEVERITY:
            return stage
    last = report.attempts[-1:]
    return last[0] if last and last[0].kind == "rejected" else None


def _names_of_offenders(stage: Stage) -> str:
    """The margins that were not kept; where one is proven to fail, those in doubt go unnamed."""
    failed = [c.metric for c in stage.checks if c.verdict == "FAIL"]
    wrong = list(dict.fromkeys(failed or [c.metric for c in stage.checks if c.verdict in SEVERITY]))
    return f"{figures.listed(wrong)} margin{'s' if len(wrong) > 1 else ''}" if wrong else "gate"


def claims(report: Report) -> list[Claim]:
    """What is proven about what ships, from each metric's worst check; or what went wrong, by how much."""
    if report.status == "passed":
        made = (report.release, report.holdout, *(a.stage for a in report.artifacts))
        shipped = [s for s in made if s is not None and s.checks]
        if not shipped:
            final = report.final()
            shipped = [final] if final is not None and final.checks else []
        return [c for metric in report.metrics() for c in _worst_claim(shipped, metric)]
    culprit = culprit_stage(report)
    if culprit is None:
        return []
    wrong = [c for c in culprit.checks if c.verdict in SEVERITY]
    order = report.metrics()
    wrong.sort(key=lambda c: (SEVERITY[c.verdict], order.index(c.metric), -(c.loss or 0.0)))
    return [Claim(c, culprit, sentence(c)) for c in wrong]


def _worst_claim(stages: list[Stage], metric: str) -> list[Claim]:
    owners = [(c, s) for s in stages for c in s.checks if c.metric == metric]
    chosen = worst([c for c, _ in owners], metric)
    return [Claim(c, s, sentence(c)) for c, s in owners if c is chosen][:1]


def sentence(check: Check) -> str:
    """A check in words, with the bound that decides, the margin, the confidence and n."""
    name = _NAMES.get(check.metric, check.metric.replace("_", " "))
    measure = check.measure
    margin = f"margin {measure.limit(check.margin)}"
    if check.verdict == "INVALID" or check.loss is None:
        why = check.reason or ("the loss is not finite" if check.loss is None else "the measurement cannot be trusted")
        return f"{name}: no valid measurement ({why}; {margin})"
    if check.exact:
        return f"{name} {measure.text(check.loss, signed=False)} ({margin}; exact)"
    if check.fixed:
        return f"{name} {measure.text(check.loss)} ({margin}; exact on a fixed set of {evidence(check)})"
    basis = f"at {figures.percent(check.confidence)} confidence over {evidence(check)}"
    estimate = f"{name} {measure.text(check.loss)}"
    if check.verdict == "FAIL":
        because = f": {check.reason}" if check.reason else ""
        return f"{estimate} (lower bound {measure.text(check.lower, 'down')}, {margin}) {basis}{because}"
    if check.verdict == "INCONCLUSIVE":
        if check.reason:
            return f"{estimate} (upper bound {measure.text(check.upper, 'up')}) {basis}: {check.reason}"
        return f"{estimate} (between {check.bounds().replace(' to ', ' and ')}, {margin}) {basis}"
    return f"{estimate} (upper bound {measure.text(check.upper, 'up')}, {margin}) {basis}"


def evidence(check: Check) -> str:
    """The sample behind a check: "83 documents, 9,204 tokens of wiki"."""
    parts = [figures.count(check.examples, check.noun)]
    if check.tokens is not None and check.tokens != check.examples:  # an answer counts as one
        parts.append(figures.count(check.tokens, "tokens"))
    return ", ".join(parts) + (f" of {check.source}" if check.source else "")


def scope(report: Report) -> str:
    """Over what the claims hold: they quote the worst of these."""
    checks = [c for s in (report.release, *(a.stage for a in report.artifacts)) if s for c in s.checks]
    sources = sorted({c.source for c in checks if c.source and not c.exact})
    parts = ["the final model"] if report.release is not None else []
    parts += ["the same model on documents that no recipe has chosen by"] if report.holdout is not None else []
    if report.artifacts:
        files = figures.count(float(len(report.artifacts)), "exported artifacts")
        parts.append(f"{files}, each executed in its own runtime")
    text = "The worst of " + figures.listed(parts) if parts and checks else ""
    return f"{text}, on {figures.listed(sources)}." if text and sources else f"{text}." if text else ""


def sensitivity(report: Report) -> str:
    """What the checks made of losses planted in the baseline; empty where none was."""
    if not report.planted:
        return ""
    parts = []
    for p in report.planted:
        name = f"{_NAMES.get(p.metric, p.metric.replace('_', ' '))} on {p.source}"
        text = p.measure.text
        seen = f"planted {text(p.planted)}, measured {text(p.measured)}, margin {p.measure.limit(p.margin)}: seen"
        parts.append(f"{name} ({seen if p.verdict == 'SEEN' else f'{p.verdict.lower()}: {p.reason}'})")
    lead = "Before any verdict a loss just above each margin was planted in the baseline, which its check must see: "
    return lead + "; ".join(parts) + "."


def noise(report: Report) -> str:
    """What identical weights lose; empty where it was not measured."""
    if not report.noise:
        return ""
    parts = []
    for n in report.noise:
        name = f"{_NAMES.get(n.metric, n.metric.replace('_', ' '))} on {n.source}"
        loss = "not finite" if n.loss is None else figures.tiny(n.measure.forward(n.loss)) + n.measure.suffix
        parts.append(f"{name} {loss} ({figures.count(n.examples)} examples)")
    lead = "The baseline was also compared with itself, in other batches, on other threads and in float32: its loss, "
    return f"{lead}below which no margin is accepted unless chance explains it, is " + "; ".join(parts) + "."


def ratio(before: float | None, after: float | None) -> str:
    """How many times smaller; empty where it cannot be said."""
    return f"{before / after:.1f}x smaller" if before and after and after < before else ""


def capital(text: str) -> str:
    """The sentence with a capital."""
    return text[:1].upper() + text[1:]
