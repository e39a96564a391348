"""Self-relations of queries, keys and values, and their divergence: what attention distillation compares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def log_relations(x: Tensor, heads: int) -> Tensor:
    """Logarithms of softmax(x_i · x_j / √d) over j ≤ i, zeros for j > i.

    x: (tokens, heads · d) → (heads, tokens, tokens).
    """
    tokens, width = x.shape
    split = x.view(tokens, heads, -1).transpose(0, 1)  # (heads, tokens, d)
    scores = split @ split.transpose(1, 2) / (width // heads) ** 0.5
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return log_softmax(scores.masked_fill(later, -torch.inf), dim=-1).masked_fill(later, 0.0)


def relation_divergence(own: Tensor, theirs: Tensor, heads: int) -> Tensor:
    """KL(theirs ‖ own) of the relations of each token with those before it, averaged over heads: (tokens,) nats.

    own: (tokens, w) float32, theirs: (tokens, v), of one kind (queries, keys or values) of two models; `heads` relation
    heads divide both widths, which need not be equal.
    Wang et al. 2021, MiniLMv2, arXiv:2012.15828, equations 4 to 7, for attention that looks back alone.
    """
    log_p, log_q = log_relations(theirs, heads), log_relations(own, heads)
    p = log_p.exp().tril()  # the later tokens' zeros are no logarithms
    return (p * (log_p - log_q)).sum(dim=-1).mean(dim=0)
