"""Continuations of one context as a tree of tokens, which one forward pass scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """Tokens of which each but the first follows its parent; a parent stands before its children.

    paths: for each continuation the nodes whose rows of logits predict its tokens, from the context's last on.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


def trie(context: Sequence[int], continuations: Sequence[Sequence[int]]) -> Trie:
    """The context once, and every token that continuations have in common once; their last ones predict nothing.

    Raises ValueError for an empty context or continuation.

    >>> trie([7, 8], [[1, 2, 3], [1, 4, 5], [6]])
    Trie(tokens=(7, 8, 1, 2, 4), parents=(-1, 0, 1, 2, 2), depths=(0, 1, 2, 3, 3), paths=((1, 2, 3), (1, 2, 4), (1,)))
    """
    if not context or not all(continuations):
        raise ValueError("a context and each of its continuations need a token")
    tokens, parents = list(context), list(range(-1, len(context) - 1))
    depths, known, paths = list(range(len(context))), dict[tuple[int, int], int](), []
    for continuation in continuations:
        path = [len(context) - 1]
        for token in continuation[:-1]:
            node = known.setdefault((path[-1], token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(path[-1])
                depths.append(depths[path[-1]] + 1)
            path.append(node)
        paths.append(tuple(path))
    return Trie(tuple(tokens), tuple(parents), tuple(depths), tuple(paths))


def visible(found: Trie, length: int) -> Tensor:
    """(length, length) bool: whether row i attends to column j, which are its ancestors and itself.

    Padding behind the last token attends to the first alone: a row that sees nothing would be NaN.
    """
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:, 0] = True
    straight = next((i for i, p in enumerate(found.parents) if p != i - 1), len(found.parents))
    mask[:straight, :straight] = torch.ones(straight, straight, dtype=torch.bool).tril()
    for i in range(straight, len(found.parents)):
        mask[i] = mask[found.parents[i]]
        mask[i, i] = True
    return mask
