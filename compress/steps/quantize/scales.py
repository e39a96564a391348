"""Scale distillation: codes stay as they are, and their scales and the norms learn from the baseline.

What mlx-lm calls distilled weight quantization, on the field's usual loss (Hinton et al. 2015, arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.encodings import EncodedTensor
from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.distill._fields import Distillation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model import Model
    from compress.steps.distill._network import Network


class Scales(Distillation):
    """Train the scales of coded linears, and the norms, on T² KL(baseline_T ‖ model_T); every code stays.

    A float16 scale s is learned as exp(θ) s from θ = 0, so that one learning rate fits scales of all sizes and none
    changes its sign; the model that learns, is measured and is kept decodes that product rounded to float16, as it
    will be stored. The gains of the residual stream learn at the learning rate times their root mean square.
    Integer zero points, a step of which is a whole code, and mxfp4's scales, which are powers of two, stay as they
    are, and so do embeddings. The rest is as in distill.logits; besides, training ends after `patience` checks in a
    row without a new best.
    """

    name: ClassVar[str] = "quantize.scales"
    packs: ClassVar[bool] = True
    refines: ClassVar[bool] = True

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    patience: int | None = Field(2, ge=1)

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error scales and norms are as they were."""
        from compress.steps.distill._checkpoints import workplace
        from compress.steps.distill._coded import learnable, rescaled
        from compress.steps.distill._lessons import Reading
        from compress.steps.distill._network import Network, recomputing, training
        from compress.steps.distill._training import Learner, Ruler, first, learn, plan_batches

        coded = learnable(model)
        if not coded:
            raise RecipeError(f"{self.name}: no linear holds codes with float16 scales; quantize before it")
        teacher = Network(self.opened(model, context).module, learns=False)
        lesson = Reading(teacher, self.temperature, alpha=1.0)
        ruler = Ruler(self.name, teacher, first(context.selection, self.selection_tokens))
        batches = plan_batches(self.name, context.calibration, self.tokens, self.batch, context.seed)
        with workplace(context) as folder, training(model, "norms", 0, context.seed, folder) as gains:
            rates = {n: self.learning_rate * float(g.detach().square().mean().sqrt()) for n, g in gains.items()}
            student = Network(model.module, learns=True)
            with scaled(model, student, coded) as (thetas, settle), ExitStack() as stack:
                if self.gradient_checkpointing:
                    stack.enter_context(recomputing(model, student))
                rates |= dict.fromkeys(thetas, self.learning_rate)
                learner = Learner(student, {**gains, **thetas}, rates, masks={}, settle=settle)
                outcome = learn(self, learner, lesson, ruler, batches, context, folder)
            learned = {name: rescaled(coded[name], theta) for name, theta in thetas.items()}
            for name, tensor in learned.items():
                model.store(name, tensor)
        left = len(model.facts.linears) - len(coded)
        rest = f"; {left} linears have no scales to learn" if left else ""
        context.notes.append(f"{self.name}: {outcome} ({self.tokens} tokens){rest}")


@contextmanager
def scaled(
    model: Model, student: Network, coded: Mapping[str, EncodedTensor]
) -> Iterator[tuple[dict[str, nn.Parameter], Callable[[], None]]]:
    """A θ of zeros per coded tensor that the student's linears answer to, and what decodes all of them anew."""
    import torch

    from compress.steps.distill._coded import rescaled

    inside = {parameter: name for name, parameter in student.body.named_parameters()}
    weights = {name: student.frozen[inside[model.parameter(name)]] for name in coded}
    thetas: dict[str, nn.Parameter] = {}
    layers = []
    for name, tensor in coded.items():
        assert tensor.scales is not None
        thetas[name] = torch.nn.Parameter(torch.zeros(tensor.scales.shape))
        layers.append(model.module.get_submodule(name.removesuffix(".weight")))
        layers[-1].forward = _forward(layers[-1], thetas[name])

    def settle() -> None:
        for name, theta in thetas.items():
            weights[name].copy_(rescaled(coded[name], theta).decode())

    try:
        yield thetas, settle
    finally:
        for layer in layers:
            del layer.forward  # the class's own again
        for name, weight in weights.items():  # which may be the model's own
            weight.copy_(coded[name].decode())


def _forward(layer: Any, theta: Tensor) -> Callable[[Tensor], Tensor]:
    """W x + b, with a gradient for θ behind W instead of one for W."""
    from compress.numerics.scaled_linear import ScaledLinear

    def forward(x: Tensor) -> Tensor:
        product: Tensor = ScaledLinear.apply(x, layer.weight, theta)  # type: ignore[no-untyped-call]
        return product if layer.bias is None else product + layer.bias.to(product.dtype)

    return forward
