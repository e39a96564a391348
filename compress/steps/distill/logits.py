"""Knowledge distillation on logits: the compressed model relearns what the baseline says."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.distill._fields import Distillation

if TYPE_CHECKING:
    from compress.architectures import Facts
    from compress.model import Model

# Starting points from a few short runs on a 135M model, 30 % pruned; not the result of a search.
LEARNING_RATES = {"norms": 4e-4, "lora": 3e-4, "all": 2e-5}


class Logits(Distillation):
    """Train on α T² KL(teacher_T ‖ student_T) + (1 − α) cross-entropy for a fixed number of tokens.

    The teacher is the recipe's baseline; the data are the calibration windows in a seeded random order,
    over and over until `tokens` are read. train: `norms` (the gains of the residual stream), `lora`
    (adapters of rank `lora_rank` on the blocks' linears, merged afterwards) or `all`. batch: windows per
    optimizer step. learning_rate: the peak, by default chosen for `train`.

    KL to the teacher is measured on the first `selection_tokens` of the selection data before training and
    `checks` times along it; the best of these states is kept, the starting one included. Masked weights
    stay zero. Matrix products run in bfloat16, losses and updates in float32 (Adam, linear warm-up over a
    tenth of the steps, cosine decay, gradients clipped to `clip`).
    Hinton et al. 2015, arXiv:1503.02531.
    """

    name: ClassVar[str] = "distill.logits"

    alpha: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    train: Literal["all", "norms", "lora"] = "norms"
    lora_rank: int = Field(16, ge=1)

    def check(self, facts: Facts) -> None:
        """Refuse a LoRA recipe before weights load where peft is not installed."""
        import importlib.util

        if self.train == "lora" and importlib.util.find_spec("peft") is None:
            raise RecipeError(f"{self.name}: train=lora needs peft: pip install 'compress-toolkit[distill]'")

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error the weights are as they were."""
        from compress.steps.distill import _network as net
        from compress.steps.distill._training import Learner, learn

        net.trained_tensors(model, self.train)
        teacher = net.Network(self.teacher(model, context).module, learns=False)
        with net.training(model, self.train, self.lora_rank, context.seed) as parameters:
            student = net.Network(model.module, learns=True)
            rate = self.learning_rate or LEARNING_RATES[self.train]
            learner = Learner(student, parameters, dict.fromkeys(parameters, rate), model.masks)
            outcome = learn(self, learner, teacher, context, self.alpha)
        context.notes.append(f"{self.name}: {outcome} ({self.tokens} tokens)")
