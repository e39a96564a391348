"""Planted losses: a baseline made worse by a known amount, without asking the evaluator that shall find it.

The loss on given documents is worked out from the baseline's own logits. Likelihoods are harmed by sharpening
every next-token distribution, p' ∝ p^(1+b): the loss is convex in b and grows without bound unless the model
is always certain and right. Mixing with the uniform distribution, which comes to mind first, *improves*
whatever predicts worse than guessing, and a single surprising token. Answers are harmed by making the first
token that tells the right choice from the others impossible, in its context alone.
"""

from __future__ import annotations

import hashlib
import math
import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.branching import Branches, branch_logits
from compress.interfaces import Documents, Example, LanguageModel, Score
from compress.labels import labels_of
from compress.numerics.sampling import Pick, greedy
from compress.pairs import predicted
from compress.scoring import Memo, batches

if TYPE_CHECKING:
    from torch import Tensor

    from compress.numerics.tempering import Curves

Kind = Literal["nll", "kl"]
Window = tuple[int, ...]
Change = Callable[[Window, "Tensor"], "Tensor"]
_IMPOSSIBLE = 1e4  # nats, beyond any lead


@dataclass(frozen=True)
class Planted:
    """A model whose logits are changed by a function of the window and its rows."""

    inner: LanguageModel
    name: str  # tells this change from any other
    change: Change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def digest(self) -> str:
        """Its own: this is another model."""
        return hashlib.sha256(f"{self.inner.digest} {self.name}".encode()).hexdigest()

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """As the inner model's, changed."""
        for window, rows in zip(windows, self.inner.logits(windows), strict=True):
            yield self.change(tuple(window), rows)

    def branch_logits(self, items: Sequence[Branches]) -> Iterator[list[Tensor]]:
        """As the inner model's, changed; see `compress.branching`."""
        for (context, continuations), found in zip(items, branch_logits(self.inner, items), strict=True):
            yield [self._branch(context, c, rows) for c, rows in zip(continuations, found, strict=True)]

    def _branch(self, context: Sequence[int], continuation: Sequence[int], rows: Tensor) -> Tensor:
        """The change needs a row for every token of the window: those of the context are left empty."""
        import torch

        unread = rows.new_zeros(len(context) - 1, rows.shape[1])
        window = (*context, *continuation[:-1])
        return self.change(window, torch.cat([unread, rows]))[len(context) - 1 :]

    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """As the inner model's, changed."""
        return self.change(tuple(window), self.inner.decode_logits(window))

    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """Continuation by the changed logits, without a cache."""
        tokens: list[int] = []
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in self.inner.eos_ids):
            tokens.append(pick(next(self.logits([(*prompt, *tokens)]))[-1]))
        return tokens


def windows_of(model: LanguageModel, documents: Sequence[tuple[str, str]], length: int) -> list[Window]:
    """Consecutive windows of the documents that predict a token; whole texts for a classifier."""
    texts = [model.encode(text) for _, text in documents]
    if labels_of(model):
        return [tuple(text) for text in texts]
    cut = [tuple(t[start : start + length]) for t in texts for start in range(0, len(t), length)]
    return [window for window in cut if len(window) > 1]


@dataclass
class Sharpened:
    """Logits times 1 + b, and the loss that this makes on the documents observed."""

    kind: Kind
    b: float
    seen: Curves | None = None

    def model(self, inner: LanguageModel) -> Planted:
        """The sharpened model."""
        return Planted(inner, f"sharpened by {self.b!r}", lambda _, rows: rows * (1 + self.b))

    def observe(self, model: LanguageModel, documents: Sequence[tuple[str, str]], length: int) -> None:
        """Add documents. model: the one that is harmed, as it was."""
        self.seen = _sum(self.seen, _curves(model, windows_of(model, documents, length), self.b, 1))

    def loss(self) -> float:
        """In nats per token, over what was observed; NaN where that is nothing."""
        import numpy as np

        return float(getattr(self.seen, self.kind)(np.array([self.b]))[0]) if self.seen else math.nan


def sharpening(model: LanguageModel, data: Documents, losses: Sequence[tuple[Kind, float]]) -> list[Sharpened | None]:
    """For each (kind, loss in nats per token) the sharpening that makes it on the documents, in one pass.

    None where none within reach does. Interpolation leaves errors of some 1 % of a loss.
    """
    import numpy as np

    from compress.numerics.tempering import LADDER, crossing, deviation

    unit, total = 0.0, None
    for documents in batches(data.documents):
        windows, memo = windows_of(model, documents, data.length), Memo(model)
        if windows and not unit:
            spread = deviation(next(memo.logits(windows[:1])))
            unit = math.sqrt(2 * min(loss for _, loss in losses)) / spread / 4 if spread > 0 else 1.0
        total = _sum(total, _curves(memo, windows, unit, len(LADDER)))
    if total is None:
        return [None] * len(losses)
    b = unit * np.array(LADDER, dtype=np.float64)
    found = [(kind, crossing(b, getattr(total, kind)(b), loss)) for kind, loss in losses]
    return [None if x is None else Sharpened(kind, x) for kind, x in found]


def _curves(model: LanguageModel, windows: Sequence[Window], unit: float, points: int) -> Curves | None:
    """Sums over all scored tokens; None where there is no window."""
    import torch

    from compress.numerics.tempering import curves

    total: Curves | None = None
    for window, rows in zip(windows, model.logits(windows), strict=True):
        if labels_of(model):  # a divergence needs no right answer
            scored, targets = rows, torch.zeros(len(rows), dtype=torch.long)
        else:
            scored, targets = rows[:-1], torch.tensor(predicted(window, len(rows)))
        total = _sum(total, curves(scored, targets, unit, points))
    return total


def _sum(a: Curves | None, b: Curves | None) -> Curves | None:
    return a + b if a and b else a or b


@dataclass(frozen=True)
class Forgotten:
    """Answers made wrong. lost: cluster → fraction of its items that become wrong, 0 for most."""

    lost: Mapping[str, float]
    first_tokens: tuple[tuple[Window, int], ...]  # context → the token that begins the right choice

    def model(self, inner: LanguageModel) -> Planted:
        """The model that cannot give these answers."""
        return Planted(inner, f"forgot {self.first_tokens!r}", self._change)

    def observe(self, model: LanguageModel, documents: Sequence[tuple[str, str]], length: int) -> None:
        """Nothing to add: what becomes wrong is known beforehand."""

    def loss(self) -> float:
        """Mean over clusters."""
        return sum(self.lost.values()) / len(self.lost)

    def _change(self, window: Window, rows: Tensor) -> Tensor:
        # Counted from the end: a classifier has a row for the whole window alone.
        places = [(len(c) - 1 - len(window), token) for c, token in self.first_tokens if window[: len(c)] == c]
        hit = [(place, token) for place, token in places if place >= -len(rows)]
        if hit:
            rows = rows.clone()
            for row, token in hit:
                rows[row, token] -= _IMPOSSIBLE
        return rows


def forgetting(examples: Sequence[Example], scores: Sequence[Score], loss: float) -> Forgotten | None:
    """Make just so many clusters wrong, evenly spread, that their share exceeds `loss`; None where it cannot.

    examples: their payloads are the tokens of each choice, the right one first. scores: the model's, 0 where
    it is right; clusters with a wrong answer have nothing to forget.
    """
    clusters: dict[str, list[tuple[Example, bool]]] = {}
    for example, score in zip(examples, scores, strict=True):
        clusters.setdefault(example.cluster, []).append((example, score.total == 0))
    needed = math.floor(loss * len(clusters)) + 1
    able = [forks for c in clusters.values() if (forks := _forks(c))]
    if needed > len(able):
        return None
    first = [able[i * len(able) // needed] for i in range(needed)]
    taken: dict[Window, int] = {}
    chosen = 0
    for forks in (*first, *(f for f in able if f not in first)):
        # Both choices made impossible in one context would leave their order as it was.
        if chosen < needed and all(taken.get(context, token) == token for context, token in forks.items()):
            taken |= forks
            chosen += 1
    if chosen < needed:
        return None
    lost = {name: sum(_turn(e, right, taken) for e, right in c) / len(c) for name, c in clusters.items()}
    return Forgotten(lost, tuple(taken.items()))


def _forks(cluster: Sequence[tuple[Example, bool]]) -> dict[Window, int]:
    """Context → the first token of the right choice, over a cluster's items; empty where it cannot be forgotten.

    That is where an item is wrong already or has no such token, or where two items in one context have each the
    other's right choice.
    """
    forks: dict[Window, int] = {}
    for example, right in cluster:
        fork = _fork(example)
        if not right or fork is None or forks.setdefault(*fork) != fork[1]:
            return {}
    return forks


def _turn(example: Example, right: bool, impossible: Mapping[Window, int]) -> int:
    """1 where an answer becomes wrong, -1 where it becomes right, 0 where it stays."""

    def hits(choice: Window) -> int:
        return sum(impossible.get(choice[:i]) == token for i, token in enumerate(choice))

    ours, *others = (hits(tuple(choice)) for choice in example.payload)
    if right:
        return int(ours > min(others))
    return -int(ours < min(others))


def _fork(example: Example) -> tuple[Window, int] | None:
    """The tokens that all choices share, and the right one's next; None where it has none."""
    right: Window = tuple(example.payload[0])
    shared = len(os.path.commonprefix(list(example.payload)))
    return (right[:shared], right[shared]) if 0 < shared < len(right) else None
