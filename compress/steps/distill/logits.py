"""Knowledge distillation on logits: the compressed model relearns what the baseline says."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.distill._fields import WeightDistillation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.architectures import Facts
    from compress.model import Model
    from compress.steps.distill._lessons import Lesson
    from compress.steps.distill._training import Ruler


class Logits(WeightDistillation):
    """Train on α T² D(teacher_T, student_T) + (1 − α) cross-entropy for a fixed number of tokens.

    train: `norms` (the gains of the residual stream), `lora` (adapters, merged afterwards) or `all`.
    divergence: D is `forward`, KL(teacher ‖ student), `reverse`, KL(student ‖ teacher), or `js`, Jensen–Shannon's.
    top_k: the teacher reads every window once, before training; its k likeliest tokens and the mass of all others
    are kept, and teacher and student are never in memory together. KL to the teacher, which chooses the state that
    is kept, is always the forward one over the whole vocabulary.
    Hinton et al. 2015, arXiv:1503.02531.
    """

    name: ClassVar[str] = "distill.logits"

    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    alpha: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    divergence: Literal["forward", "reverse", "js"] = "forward"
    top_k: int | None = Field(None, ge=1)

    def check(self, facts: Facts) -> None:
        """Refuse, before weights load, more tokens than there are."""
        super().check(facts)
        if self.top_k is not None and self.top_k > facts.vocabulary:
            raise RecipeError(
                f"{self.name}: top_k={self.top_k}, and the vocabulary has {facts.vocabulary} tokens; lower it"
            )

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error the weights are as they were."""
        from compress.steps.distill import _network as net
        from compress.steps.distill._training import plan_batches

        self.check(model.facts)
        net.trained_tensors(model, self.train)
        teacher = self.opened(model, context)
        batches = plan_batches(self.name, context.calibration, self.tokens, self.batch, context.seed)
        if self.top_k is None:
            lesson, ruler, kept = *self._asked(teacher, context), ""
        else:
            lesson, ruler, kept = self._recorded(model, teacher, batches, self.top_k, context)
        outcome = self.fit(model, context, lesson, ruler, batches)
        context.notes.append(f"{self.name}: {outcome} ({self.tokens} tokens){kept}")

    def _asked(self, teacher: Model, context: Context) -> tuple[Lesson, Ruler]:
        """A teacher that reads beside the student."""
        from compress.steps.distill._lessons import Reading
        from compress.steps.distill._network import Network
        from compress.steps.distill._training import Ruler, first

        network = Network(teacher.module, learns=False)
        ruler = Ruler(self.name, network, first(context.selection, self.selection_tokens))
        return Reading(network, self.temperature, self.alpha, self.divergence), ruler

    def _recorded(
        self, model: Model, teacher: Model, batches: Sequence[Sequence[Tensor]], k: int, context: Context
    ) -> tuple[Lesson, Ruler, str]:
        """A teacher that has read before, while the student was out of memory, and is gone; what it takes, in words."""
        from compress.numerics.top_k import bytes_per_token
        from compress.steps.distill._lessons import Recording, record, set_aside
        from compress.steps.distill._network import Network
        from compress.steps.distill._training import Ruler, first

        with set_aside(model.module):
            network = Network(teacher.module, learns=False)
            ruler = Ruler(self.name, network, first(context.selection, self.selection_tokens))
            windows = [window for batch in batches for window in batch]
            said = record(network, windows, k, self.temperature, context.progress)
            network.release_body()
            self.dismiss(teacher, context)
        size = sum(top.nbytes for top in said.values())
        note = (
            f"; of the teacher, the {k} likeliest tokens and the mass of the rest at each position: "
            f"{bytes_per_token(k, model.vocabulary_size)} bytes per token, {size / 1e6:.1f} MB"
        )
        return Recording(said, self.temperature, self.alpha, self.divergence), ruler, note
