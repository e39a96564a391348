"""On-policy distillation: the teacher scores what the student itself writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.distill._fields import Generation

if TYPE_CHECKING:
    from compress.model import Model


class OnPolicy(Generation):
    """Train on T² D(teacher_T, student_T) along sequences that the student writes while it learns.

    student_share: the probability, λ in the paper, that an optimizer step learns from the student's own sequences;
    otherwise it learns from the calibration windows' own continuations. divergence: D is `forward`, KL(teacher ‖
    student), `reverse`, KL(student ‖ teacher), or `js`, Jensen–Shannon's. Only what comes after a prompt is scored,
    and no gradient flows through the choice of tokens. `tokens` counts prompts too, and a sequence that ends early
    as if it had not.
    Agarwal et al. 2024, generalized knowledge distillation, arXiv:2306.13649.
    """

    name: ClassVar[str] = "distill.on_policy"

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    student_share: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    divergence: Literal["forward", "reverse", "js"] = "reverse"

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error the weights are as they were."""
        import torch

        from compress.steps.distill import _network as net
        from compress.steps.distill._lessons import Reading, Writing
        from compress.steps.distill._parallel import place
        from compress.steps.distill._training import Ruler, first, plan_batches

        self.check(model.facts)
        if place()[1] > 1:
            raise RecipeError(f"{self.name}: the model writes in one process, found {place()[1]}; run it in one")
        net.trained_tensors(model, self.train)
        teacher = net.Network(self.opened(model, context).module, learns=False)
        given, length = self.prompt_tokens, self.prompt_tokens + self.new_tokens
        windows = [window[:length] for window in context.calibration]
        batches = plan_batches(self.name, windows, self.tokens, self.batch, context.seed, given)
        ruler = Ruler(self.name, teacher, first(context.selection, self.selection_tokens))
        lesson = Writing(
            Reading(teacher, self.temperature, 1.0, self.divergence, given),
            self.name,
            self.student_share,
            self.sampling_temperature,
            model.eos_ids,
            torch.Generator().manual_seed(context.seed),
        )
        outcome = self.fit(model, context, lesson, ruler, batches)
        context.notes.append(
            f"{self.name}: {outcome} ({self.tokens} tokens); {lesson.own} of {lesson.own + lesson.others} steps "
            f"learned from {lesson.written} tokens that the model wrote itself"
        )
