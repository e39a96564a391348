"""The data of a recipe: what it asks for, and which of its parts the gates look at."""

from __future__ import annotations

from collections.abc import Sequence

from compress.data import Request, Role, Split
from compress.interfaces import Documents
from compress.recipe import Recipe


def requests(recipe: Recipe) -> list[Request]:
    """What a recipe asks of its data: calibration, selection, each evaluation source, and the holdout if any."""
    data = recipe.data
    return [
        Request("calibration", data.calibration.source, data.calibration.tokens, data.calibration.length),
        Request("selection", data.selection.source, data.selection.tokens, data.selection.length),
        *(Request("evaluation", s.source, None, s.length) for s in data.evaluation),
        *([Request("holdout", data.holdout.source, None, data.holdout.length)] if data.holdout else []),
    ]


def evaluation(parts: Sequence[Split], role: Role = "evaluation") -> list[Documents]:
    """The evaluation sources (or those of another role) among the parts of a recipe's data, in gate order."""
    return [
        Documents(p.request.source, [(d.id, d.text) for d in p.documents], p.digest, p.request.length)
        for p in parts
        if p.request.role == role
    ]
