"""A teacher's next-token distributions cut to their k likeliest tokens and the mass of all others, bit-packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from compress.numerics.distillation import NOTHING
from compress.numerics.packing import pack_rows, unpack_rows


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Room of one distribution: k indices of just as many bits as the vocabulary needs, k halves, one float.

    >>> bytes_per_token(64, 49152)
    260
    """
    return (k * _bits(vocabulary) + 7) // 8 + 2 * k + 4


def _bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


@dataclass(frozen=True)
class TopK:
    """Distributions of some tokens at one temperature T.

    ids: (tokens, bytes) packed indices, the likeliest first. gaps: (tokens, k) float16, how far each logit lies
    below the largest. rest: (tokens,) float32, ln Σ exp((z − z_max) / T) over all other tokens, −∞ for none. A half
    holds the gap of two bfloat16 logits, exactly wherever it matters.
    """

    ids: Tensor
    gaps: Tensor
    rest: Tensor
    bits: int
    temperature: float

    @staticmethod
    def of(logits: Tensor, k: int, temperature: float) -> TopK:
        """Cut logits (tokens, vocabulary) to their k largest."""
        logits = logits.float()
        values, ids = logits.topk(k, dim=1)
        below = logits - values[:, :1]
        rest = (below.scatter(1, ids, float("-inf")) / temperature).logsumexp(dim=1)
        gaps = (values[:, :1] - values).clamp(max=torch.finfo(torch.half).max).half()
        bits = _bits(logits.shape[1])
        return TopK(pack_rows(ids, bits), gaps, rest, bits, temperature)

    @staticmethod
    def join(parts: list[TopK]) -> TopK:
        """The tokens of all parts, which were cut alike, one after another."""
        ids, gaps, rest = (torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "gaps", "rest"))
        return TopK(ids, gaps, rest, parts[0].bits, parts[0].temperature)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.ids.nbytes + self.gaps.nbytes + self.rest.nbytes

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Indices (n, k) and log-probabilities (n, k + 1) of these tokens, the last that of all other tokens."""
        ids = unpack_rows(self.ids[rows], self.bits, self.gaps.shape[1])
        scores = torch.cat([-self.gaps[rows].float() / self.temperature, self.rest[rows, None]], dim=1)
        return ids, log_softmax(scores, dim=1).clamp_(min=NOTHING)
