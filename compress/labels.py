"""Models with a classification head, among language models: what every runtime says of them."""

from __future__ import annotations


def labels_of(model: object) -> tuple[str, ...]:
    """Classes that a model's head tells apart; empty for a model of text, which need not have the attribute.

    Of such a model, `logits` gives one row (1, classes) per window, the text as a whole; `encode` puts the special
    tokens around a text and cuts it to the context; and whatever goes token by token raises RecipeError.
    """
    found: tuple[str, ...] = getattr(model, "labels", ())
    return found
