"""Generation: how many more answers collapse when the model writes freely, which teacher forcing cannot see."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field

from compress.interfaces import Documents, Example, LanguageModel, Sample, Score
from compress.numerics.repetition import distinct_share, loops
from evaluators import _samples
from evaluators._answers import check_room, ids, nats_per_token
from evaluators._census import Census
from evaluators._prompts import PROMPTS
from evaluators._windows import Percent

SPAN, LONGEST = 24, 12  # an answer that ends on 24 tokens of a loop of at most 12 will not leave it
GRAM, LEAST_DISTINCT = 4, 0.5  # half of the 4-grams seen before: whole sentences come again
MEANINGFUL = 16  # tokens, below which a repetition may well be what was asked for
# Nats per token that the reference gives an answer. SmolLM2-135M gives other people's English 3, the answers of its
# int8, int4 and int3 roundings at most 0.9, 1.1 and 2.7, and those of int2, a salad of words, 9 to 11 (4 prompts each).
SALAD = 5.0
SHOWN = 6


class Generation(Census):
    """Answers to fixed prompts, greedily decoded, that collapse: empty, caught in a repetition, or a salad.

    The reference's collapsed answers are counted too, since small models collapse by themselves: the loss is
    the difference. Every model is asked through its own chat template, in its own runtime; whether an answer
    makes sense is judged by the reference, as a fluent reader of its own language.
    """

    name: ClassVar[str] = "generation"
    unit: ClassVar[str] = "fraction"
    definition: ClassVar[str] = (
        "fraction of the greedy answers to fixed prompts (through the chat template, where there is one) that "
        f"collapse: no text at all, the last {SPAN} tokens a loop of at most {LONGEST}, fewer than half of the "
        f"{GRAM}-grams distinct, or more than {SALAD:.0f} nats per token under the reference; the loss is that "
        "fraction less the reference's own, on these prompts and no others."
    )
    minimum_examples: ClassVar[int] = 8
    margin_fields: ClassVar[frozenset[str]] = frozenset({"max_collapsed"})

    max_collapsed: Percent = Field(lt=1.0)
    prompts: int | None = Field(None, ge=minimum_examples, le=len(PROMPTS))
    max_new_tokens: int = Field(48, ge=SPAN, le=4096)

    @property
    def margin(self) -> float:
        """Largest rise of the fraction of collapsed answers."""
        return self.max_collapsed

    @property
    def written(self) -> int:
        """Tokens of an answer."""
        return self.max_new_tokens

    def sources(self, datasets: Sequence[Documents]) -> list[Documents]:
        """The fixed prompts, whatever the evaluation sources are."""
        asked = PROMPTS[: self.prompts]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return [Documents("built-in prompts", asked, digest)]

    def encoder(self, model: LanguageModel) -> Callable[[str], list[int]]:
        """As a message to answer: a template that an artifact has lost gives other examples, which is an error."""
        return model.encode_chat

    def examples(self, data: Documents, encode: Callable[[str], list[int]]) -> list[Example]:
        """One example per prompt; its payload is the prompt's tokens."""
        return [Example(name, name, tuple(encode(text))) for name, text in data.documents]

    def score(
        self, model: LanguageModel, batch: Sequence[Example], reference: LanguageModel | None = None
    ) -> list[Score]:
        """1 for a collapsed answer, 0 for another, NaN where the model's logits on it are not finite.

        positions: the answer's tokens. extra: whether it ended by itself, and the nats per token that the model
        (`nats`) and its judge, the reference or else the model, give it in one pass: in them different weights
        differ even where their answers do not.
        """
        check_room(model, [e.payload for e in batch], self.max_new_tokens)
        answers = [tuple(model.generate(e.payload, self.max_new_tokens)) for e in batch]
        prompts = [e.payload for e in batch]
        own = nats_per_token(model, prompts, answers)
        judged = own if reference is None else nats_per_token(reference, prompts, answers)
        return [_score(model, *row) for row in zip(batch, answers, own, judged, strict=True)]

    def display(self, loss: float) -> str:
        """The loss in percentage points of collapsed answers.

        >>> Generation(max_collapsed="10%").display(0.0625)
        '+6.25 points'
        """
        return f"{100 * loss + 0.0:+.2f} points"

    def doubt(self, scores: Sequence[Score], reference: Sequence[Score]) -> str:
        """A reference that collapses nearly everywhere leaves no room for a loss beyond the margin."""
        collapsed = sum(s.total for s in reference)
        if len(reference) - collapsed > self.margin * len(reference):
            return ""
        return f"the reference itself collapses on {collapsed:.0f} of {len(reference)} prompts: no loss could be seen"

    def details(self, scores: Sequence[Score], reference: Sequence[Score] = ()) -> dict[str, float]:
        """Flips both ways, answers that ended, what is kept of the reference's, lengths and distinct n-grams."""
        newly, recovered = _samples.flips(scores, reference)
        found = {"newly collapsed": newly, "recovered": recovered}
        kept = [_shared(old, new) / max(1, len(old.positions)) for old, new in zip(reference, scores)]
        if kept:
            found["reference's tokens before the first difference"] = sum(kept) / len(kept)
        for whose, some in (("", scores), ("reference's ", reference)):
            if some:
                found[f"{whose}nats per token under the reference"] = sum(s.extra["judged"] for s in some) / len(some)
                found[f"{whose}answers that ended"] = sum(s.extra["ended"] for s in some) / len(some)
                found[f"{whose}tokens per answer"] = sum(len(s.positions) for s in some) / len(some)
                found[f"{whose}distinct {GRAM}-grams"] = sum(distinct_share(ids(s), GRAM) for s in some) / len(some)
        return found

    def samples(
        self,
        examples: Sequence[Example],
        new: Sequence[Score],
        old: Sequence[Score],
        decode: Callable[[Sequence[int]], str],
    ) -> list[Sample]:
        """Answers that newly collapsed first, then those that differ from the reference's earliest."""
        texts = dict(PROMPTS)
        ranked = sorted(zip(examples, new, old), key=lambda t: (t[2].total - t[1].total, _shared(t[2], t[1])))
        return [
            Sample(example.id, texts[example.id], decode(ids(theirs)), decode(ids(ours)), _note(theirs, ours))
            for example, ours, theirs in ranked[:SHOWN]
        ]


def _score(model: LanguageModel, example: Example, answer: tuple[int, ...], own: float, judged: float) -> Score:
    ended = answer[-1] in model.eos_ids
    written = answer[:-1] if ended else answer
    collapsed = _collapsed(written, model.decode(written)) or judged > SALAD
    total = float(collapsed) if math.isfinite(own) and math.isfinite(judged) else math.nan
    extra = {"ended": float(ended), "nats": own, "judged": judged}
    return Score(example.id, total, 1.0, extra, tuple(map(float, answer)))


def _collapsed(tokens: Sequence[int], text: str) -> bool:
    """Whether an answer, without the token that ended it, is empty or a repetition."""
    if not text.strip():
        return True
    repeats = len(tokens) >= MEANINGFUL and distinct_share(tokens, GRAM) < LEAST_DISTINCT
    return repeats or loops(tokens, SPAN, LONGEST)


def _shared(old: Score, new: Score) -> int:
    """Tokens that two answers have in common from their beginning on."""
    pairs = zip(old.positions, new.positions)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old.positions), len(new.positions)))


def _note(old: Score, new: Score) -> str:
    if new.total > old.total:
        return "newly collapsed"
    if new.total < old.total:
        return "the reference alone collapses"
    both = ", both collapsed" if new.total else ""
    if tuple(old.positions) == tuple(new.positions):
        return f"the same answer{both}"
    return f"differs after {_shared(old, new)} tokens{both}"
