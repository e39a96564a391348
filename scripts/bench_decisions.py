"""Error rates of every statistic that decides: false passes at the margin, and power without loss.

Usage: .venv/bin/python scripts/bench_decisions.py [--runs 2000] [--seed 0]
Losses are simulated, so that the true loss is known; the gate's own decision code looks after every fifth cluster, as
it does after a batch of text. Power is taken at the number of documents that `compress plan` prints for a model without
any loss (80 % at one look). Prints a Markdown table; explained in docs/gates.md. Takes minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from bench_gates import interval
from numpy.typing import NDArray

from compress.decisions import DECISIONS, PLANNED, Rule, Verdict
from compress.interfaces import Evaluator
from compress.numerics.betting import p_value
from compress.numerics.paired import holm
from compress.plan import PLANNING_SD, _lossless
from compress.plugin import evaluator

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], tuple[Floats, Floats]]
"""(generator, clusters, true loss) → losses and weights per cluster."""
EVERY = 5  # clusters between looks: 500 tokens of wiki


@dataclass(frozen=True)
class Case:
    """A check, the shape of its losses, and how many clusters it may look at."""

    check: Evaluator
    shape: str
    draw: Draw
    attempts: int = 1
    limit: int = 0  # 0: the check's own

    @property
    def rule(self) -> Rule:
        """As a gate of this check alone has it."""
        alpha = (1 - self.check.confidence) / self.attempts
        planned = max(1, min(self.check.max_documents or self.limit, PLANNED))
        return Rule(self.check.margin, alpha, alpha, planned, self.check.minimum_examples)


def tokens(rng: np.random.Generator, n: int) -> Floats:
    """Tokens per document as in wiki: median 98, log-normal."""
    found: Floats = np.round(rng.lognormal(math.log(98), 0.5, n)).clip(2)
    return found


def by_token(sd: float, noise: Callable[[np.random.Generator, int], Floats]) -> Draw:
    """Losses per token of mean `loss` and this deviation over documents. noise: of mean 0 and deviation 1."""

    def draw(rng: np.random.Generator, n: int, loss: float) -> tuple[Floats, Floats]:
        weights = tokens(rng, n)
        # Shorter documents vary more: the deviation per document falls with the root of its length.
        spread = sd * np.sqrt(weights.mean() * weights)
        return loss * weights + spread * noise(rng, n), weights

    return draw


def normal(rng: np.random.Generator, n: int) -> Floats:
    """Standard normal."""
    return rng.standard_normal(n)


def heavy(rng: np.random.Generator, n: int) -> Floats:
    """Student's t with 3 degrees of freedom, scaled to deviation 1."""
    return rng.standard_t(3, n) / math.sqrt(3)


def skewed(rng: np.random.Generator, n: int) -> Floats:
    """An exponential to the right, as few documents lose most: the direction that makes a pass too easy."""
    return rng.exponential(1.0, n) - 1


def gamma(rng: np.random.Generator, n: int, loss: float) -> tuple[Floats, Floats]:
    """Divergences are not negative: gamma of shape 2 per token."""
    weights = tokens(rng, n)
    return weights * rng.gamma(2.0, loss / 2.0, n) if loss else 1e-4 * weights * rng.random(n), weights


def flips(rate: float) -> Draw:
    """Answers that turn, both ways, of which `rate` do."""

    def draw(rng: np.random.Generator, n: int, loss: float) -> tuple[Floats, Floats]:
        chances = [(rate + loss) / 2, (rate - loss) / 2, 1 - rate]
        return rng.choice([1.0, -1.0, 0.0], n, p=chances), np.ones(n)

    return draw


def written(rng: np.random.Generator, n: int, loss: float) -> tuple[Floats, Floats]:
    """Scores in [0, 1] of which one answer in five changes to another score."""
    moved = rng.random(n) < 0.2
    lost: Floats = np.where(moved, np.clip(5 * loss + rng.normal(0, 0.2, n), -1, 1), 0.0)
    return lost, np.ones(n)


def rounds(rng: np.random.Generator, n: int, loss: float) -> tuple[Floats, Floats]:
    """Log ratios of times with a deviation of 10 %."""
    return loss + rng.normal(0, 0.1, n), np.ones(n)


def cases() -> Iterator[Case]:
    """Every statistic that samples; a fixed set ("census") and files ("exact") have no error of this kind."""
    perplexity = evaluator("perplexity")(max_increase="5%")
    divergence = evaluator("divergence")(max_mean=0.08)
    sd = PLANNING_SD
    yield Case(perplexity, "normal", by_token(sd["perplexity"], normal))
    yield Case(perplexity, "heavy tails (t, 3)", by_token(sd["perplexity"], heavy))
    yield Case(perplexity, "skewed (exponential)", by_token(sd["perplexity"], skewed))
    yield Case(perplexity, "normal, 4 attempts", by_token(sd["perplexity"], normal), attempts=4)
    yield Case(divergence, "normal", by_token(sd["divergence"], normal))
    yield Case(divergence, "gamma", gamma)
    bits = evaluator("bits_per_byte")(max_increase=0.02)
    yield Case(bits, "normal", by_token(sd["bits_per_byte"], normal))
    accuracy = evaluator("accuracy")(tasks=("minimal_pairs",), max_drop=3.0)
    yield Case(accuracy, "10 % flip", flips(0.10))
    yield Case(accuracy, "5 % flip", flips(0.05))
    yield Case(
        evaluator("text")(data="file:x.jsonl", metric="rougeL", max_drop=3.0), "1 in 5 changes", written, 1, 2000
    )
    latency = evaluator("latency")(max_ratio=0.9)
    yield Case(latency, "normal, 10 % noise", rounds, limit=200)


def decide(case: Case, rng: np.random.Generator, n: int, loss: float) -> Verdict:
    """One gate's verdict over at most n clusters, with a look after every few."""
    losses, weights = case.draw(rng, n, loss)
    decision = DECISIONS[case.check.statistic]
    if case.check.statistic == "betting":  # its bounds remember the best look so far: one at the end is all of them
        return decision(losses, weights, case.rule, False).verdict
    least = case.rule.minimum
    for k in sorted({*range(least - least % EVERY + EVERY * bool(least % EVERY), n + 1, EVERY), n}):
        verdict = decision(losses[:k], weights[:k], case.rule, False).verdict
        if verdict != "INCONCLUSIVE":
            return verdict
    return "INCONCLUSIVE"


def rate(case: Case, rng: np.random.Generator, runs: int, n: int, loss: float, tries: int) -> str:
    """Share of runs that pass in any of the tries, each at its share of the error, with its exact 95 % interval."""
    hits = sum(any(decide(case, rng, n, loss) == "PASS" for _ in range(tries)) for _ in range(runs))
    low, high = interval(hits, runs)
    return f"{hits / runs:.1%} ({low:.1%} to {high:.1%})"


def row(case: Case, seed: int, runs: int) -> str:
    """A line of the table."""
    rng, check = np.random.default_rng(seed), case.check
    limit = check.max_documents or case.limit
    known = PLANNING_SD.get(check.name)
    advertised = _lossless(check, known, case.attempts) if known else None
    power = "not planned" if advertised is None else rate(case, rng, runs, advertised, 0.0, tries=1)
    cells = [
        check.name,
        case.shape,
        check.display(check.margin),
        str(limit),
        rate(case, rng, runs, limit, check.margin, tries=case.attempts),
    ]
    return "| " + " | ".join([*cells, "" if advertised is None else str(advertised), power]) + " |"


def regressions(seed: int, runs: int, tasks: int = 5, n: int = 2000) -> str:
    """Wrong alarms of `no_regression` over tasks that lost nothing, and how often a loss of 3 points on one is seen."""
    rng, draw = np.random.default_rng(seed), flips(0.10)

    def alarms(loss: float) -> str:
        found = 0
        for _ in range(runs):
            p = [p_value(draw(rng, n, loss if i == 0 else 0.0)[0], 0.0) for i in range(tasks)]
            found += min(holm(p)) <= 0.05
        low, high = interval(found, runs)
        return f"{found / runs:.1%} ({low:.1%} to {high:.1%})"

    return (
        f"no_regression over {tasks} tasks of {n} clusters, 10 % flip: alarms without any loss {alarms(0.0)}; "
        f"with 3 points lost on one task {alarms(0.03)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    head = ["check", "losses", "margin", "n", "passes at the margin", "n planned without loss", "passes without loss"]
    print(f"{options.runs} runs a figure, 95 % confidence\n")
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for case in cases():
        print(row(case, options.seed, options.runs), flush=True)
    print(f"\n{regressions(options.seed, options.runs)}")


if __name__ == "__main__":
    main()
