"""Quantization-aware distillation: weights behind stored codes learn from the baseline, and end as codes again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.distill._fields import Distillation

if TYPE_CHECKING:
    from torch import nn

    from compress.encodings import EncodedTensor
    from compress.model import Model
    from compress.steps.distill._coded import Latent
    from compress.steps.distill._training import Outcome, Ruler


class QuantizationAware(Distillation):
    """Train the codes of coded linears, their scales and the norms on T² D(baseline_T, model_T).

    An earlier step chooses encodings and codes; this one keeps the encodings. A float32 weight stands behind each code:
    the baseline's where it rounds to the very code, else what the code decodes to. The model that learns decodes
    codes, rounded anew after every update, and float16 scales as they will be stored; gradients pass the rounding
    straight through within the range of the codes, and reach the scales as in learned step size quantization.
    learning_rate: of the weights, in codes: a weight moves by at most about so much of the way to the next code per
    step. scale_rate: of the scales' logarithms, and of the norms' gains times their root mean square. Integer zero
    points, tensors without float16 scales and embeddings stay as they are, and pruned weights stay zero.
    Esser et al. 2020, arXiv:1902.08153; with the baseline as the teacher, Liu et al. 2024, LLM-QAT, arXiv:2305.17888.
    """

    name: ClassVar[str] = "distill.qat"
    packs: ClassVar[bool] = True
    refines: ClassVar[bool] = True

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    divergence: Literal["forward", "reverse", "js"] = "forward"
    learning_rate: float = Field(0.02, gt=0, allow_inf_nan=False)
    scale_rate: float = Field(3e-3, gt=0, allow_inf_nan=False)

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error codes, scales and norms are as they were."""
        from compress.steps.distill._coded import latents, learnable
        from compress.steps.distill._network import Network
        from compress.steps.distill._training import Ruler, first

        coded = learnable(model)
        if not coded:
            raise RecipeError(f"{self.name}: no linear holds codes with float16 scales; quantize before it")
        baseline = self.opened(model, context)
        teacher = Network(baseline.module, learns=False)
        ruler = Ruler(self.name, teacher, first(context.selection, self.selection_tokens))
        behind = latents(coded, {name: p.detach() for name, p in baseline.module.named_parameters()})
        outcome = self._fit(model, context, teacher, ruler, behind)
        changed = self._store(model, behind)
        left = len(model.facts.linears) - len(coded)
        rest = f"; {left} linears have no codes that learn" if left else ""
        context.notes.append(
            f"{self.name}: {outcome} ({self.tokens} tokens); {changed:.1%} of the codes of {len(coded)} linears "
            f"are others now{rest}"
        )

    def _fit(
        self, model: Model, context: Context, teacher: object, ruler: Ruler, behind: Mapping[str, Latent]
    ) -> Outcome:
        """Train weights, scales and norms, and leave them in the best state measured."""
        from compress.steps.distill import _network as net
        from compress.steps.distill._checkpoints import workplace
        from compress.steps.distill._lessons import Reading
        from compress.steps.distill._training import Learner, learn, plan_batches

        assert isinstance(teacher, net.Network)
        lesson = Reading(teacher, self.temperature, 1.0, self.divergence)
        batches = plan_batches(self.name, context.calibration, self.tokens, self.batch, context.seed)
        with ExitStack() as stack:
            folder = stack.enter_context(workplace(context))
            gains = stack.enter_context(net.training(model, "norms", 0, context.seed, folder))
            rounded = stack.enter_context(_rounded(model, behind))
            student = net.Network(model.module, learns=True)
            if self.gradient_checkpointing:
                stack.enter_context(net.recomputing(model, student))
            rates = {n: self.scale_rate * float(g.detach().square().mean().sqrt()) for n, g in gains.items()}
            parameters: dict[str, nn.Parameter] = dict(gains)
            masks = {
                f"weight {name}": mask.view(behind[name].u.shape)
                for name, mask in model.masks.items()
                if name in behind
            }
            for name, latent in behind.items():
                parameters |= {f"weight {name}": latent.u, f"scale {name}": latent.theta}
                rates |= {f"weight {name}": self.learning_rate, f"scale {name}": self.scale_rate}
            learner = Learner(student, parameters, rates, masks, rounded.gather, rounded.settle)
            return learn(self, learner, lesson, ruler, batches, context, folder)

    def _store(self, model: Model, behind: Mapping[str, Latent]) -> float:
        """Keep what was learned as codes; the share of codes that changed."""
        changed = total = 0
        for name, latent in behind.items():
            tensor = latent.encoded()
            changed += int((tensor.codes != latent.start.codes).sum())
            total += tensor.codes.numel()
            model.store(name, tensor)
        return changed / total


class _Rounding:
    """The model's own parameters as rounded images of the weights behind them."""

    def __init__(self, model: Model, behind: Mapping[str, Latent]):
        self.behind = behind
        self.images = {name: model.parameter(name) for name in behind}
        self.now: dict[str, EncodedTensor] = {name: latent.start for name, latent in behind.items()}

    def settle(self) -> None:
        """Round the weights anew."""
        for name, latent in self.behind.items():
            self.now[name] = latent.encoded()
            self.images[name].data.copy_(self.now[name].decode())

    def gather(self) -> None:
        """Hand the images' gradients to the weights and scales."""
        for name, latent in self.behind.items():
            image = self.images[name]
            if image.grad is not None:  # as in a process whose share of the batch is empty
                latent.take(image.grad, self.now[name])
                image.grad = None


@contextmanager
def _rounded(model: Model, behind: Mapping[str, Latent]) -> Iterator[_Rounding]:
    """The coded parameters collect gradients; if the body raises, they hold what the model's codes decode to."""
    rounding = _Rounding(model, behind)
    for image in rounding.images.values():
        image.requires_grad_(True)
    try:
        yield rounding
    except BaseException:
        for name, image in rounding.images.items():
            image.data.copy_(model.encoded[name].decode())
        raise
