"""Two models timed in interleaved rounds: how many times as fast one is as the other, whatever the machine's pace."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict

from compress.errors import GateInconclusive
from compress.interfaces import LanguageModel, Streaming
from compress.labels import labels_of
from compress.pairs import paired, window_of

PROMPT_TOKENS, NEW_TOKENS = 128, 8
ROUNDS = (6, 25)  # of fewer than 6 even smallest and largest hold the median in less than 95 % of all cases
SECONDS = 8.0

Stopwatch = Callable[[], dict[str, float]]
"""Times one round of a model: seconds per token of "prefill" and, where it writes text, of "decode"."""


class Speed(BaseModel):
    """One model beside a reference, by medians over rounds. ratio: how many times as fast, with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens_per_second: float
    reference_tokens_per_second: float
    ratio: float
    lower: float
    upper: float
    rounds: int


def stream_seconds(model: Streaming, window: Sequence[int], prompt: int) -> tuple[float, float]:
    """Seconds of reading the first `prompt` tokens at once, and of feeding all others one by one."""
    started = time.perf_counter()
    rows = model.stream(window, prompt)
    next(rows)
    read = time.perf_counter()
    for _ in rows:
        pass
    return read - started, time.perf_counter() - read


def stopwatch(model: LanguageModel, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS) -> Stopwatch:
    """Times rounds on the same random tokens, on fewer where the context is shorter.

    A classifier reads a text, and decodes nothing. An encoder-decoder reads source and target at once, half of the
    prompt each, and then decodes the target's first tokens behind the source. Raises GateInconclusive for a model that
    cannot be timed.
    """
    new = min(new_tokens, model.context_length // 4)
    prompt = min(prompt_tokens, model.context_length - new)
    draw = random.Random(0)
    window = [draw.randrange(model.vocabulary_size) for _ in range(prompt + new)]
    if labels_of(model):
        return lambda: {"prefill": _seconds(lambda: list(model.logits([window[:prompt]]))) / prompt}
    if paired(model):
        half, start = prompt // 2, model.start  # type: ignore[attr-defined]
        whole = window_of(window[:half], window[half:], start, half)
        behind = window_of(window[:half], window[half : half + new], start, half)
        return lambda: {
            "prefill": _seconds(lambda: list(model.logits([whole]))) / len(whole),
            "decode": _seconds(lambda: model.decode_logits(behind)) / new,
        }
    if not isinstance(model, Streaming):
        raise GateInconclusive(f"{model.runtime} cannot be timed: its model has no `stream`")

    def times() -> dict[str, float]:
        read, decoded = stream_seconds(model, window, prompt)
        return {"prefill": read / prompt, "decode": decoded / new}

    return times


def compare(model: Stopwatch, reference: Stopwatch, seconds: float = SECONDS) -> dict[str, Speed]:
    """How many times as fast a model is as the reference, by what is timed, in as many rounds as `seconds` allow.

    Each round times both, one after the other, and rounds take turns at who is first. A machine that changes its pace
    slows both of a round, so that the ratio is taken within rounds; the median forgets the rounds it disturbed.
    """
    pair = (model, reference)
    for own in pair:  # untimed: caches are made, threads are awake, weights are read from the disk
        own()
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    started = time.perf_counter()
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() - started < seconds):
        taken = {k: pair[k]() for k in ((0, 1) if len(rounds) % 2 == 0 else (1, 0))}
        rounds.append((taken[0], taken[1]))
    return {part: _speed([(own[part], other[part]) for own, other in rounds]) for part in rounds[0][0]}


def _speed(seconds: Sequence[tuple[float, float]]) -> Speed:
    """Of (model's, reference's) seconds per token, by round."""
    ratios = [other / own for own, other in seconds]
    lower, upper = median_interval(ratios)
    return Speed(
        tokens_per_second=1 / median(own for own, _ in seconds),
        reference_tokens_per_second=1 / median(other for _, other in seconds),
        ratio=median(ratios),
        lower=lower,
        upper=upper,
        rounds=len(ratios),
    )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The two values that hold the median with at least this confidence, whatever the distribution.

    The k-th smallest and k-th largest miss it where fewer than k values lie on one side, a binomial tail (the sign
    test, inverted): Conover 1999, Practical Nonparametric Statistics, section 3.2. Of fewer than 6 values, all of them.

    >>> median_interval([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    (2.0, 8.0)
    """
    n, ordered, k = len(values), sorted(values), 1
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) <= (1 - confidence) * 2**n:
        k += 1
    return ordered[k - 1], ordered[n - k]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
