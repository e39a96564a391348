"""The fields of steps that learn what the baseline says, and how they get hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from compress.model import Model


class Distillation(Step):
    """Training for a fixed number of tokens on what the baseline says, and keeping the best of a few states.

    The data are the calibration windows in a seeded random order, over and over until `tokens` are read. batch:
    windows per optimizer step. KL to the baseline is measured on the first `selection_tokens` of the selection
    data before training and `checks` times along it.
    """

    recovers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True
    uses_selection: ClassVar[bool] = True

    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    tokens: int = Field(65536, ge=2)
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch: int = Field(4, ge=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    selection_tokens: int = Field(8192, ge=2)
    checks: int = Field(4, ge=1)

    def teacher(self, model: Model, context: Context) -> Model:
        """The baseline; raises RecipeError where it, or data, is missing or does not fit the student."""
        if context.teacher is None or not context.calibration or not context.selection:
            raise RecipeError(f"{self.name} needs a baseline, data.calibration and data.selection")
        teacher = context.teacher()
        if teacher.vocabulary_size != model.vocabulary_size:
            raise RecipeError(
                f"{self.name}: the teacher has {teacher.vocabulary_size} tokens, the model "
                f"{model.vocabulary_size}; distillation on logits needs the same vocabulary"
            )
        return teacher
