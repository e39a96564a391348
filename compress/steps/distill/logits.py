"""Knowledge distillation on logits: the compressed model relearns what the baseline says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.architectures import Facts
    from compress.model import Model
    from compress.steps.distill._network import Network

# Starting points from a few short runs on a 135M model, 30 % pruned; not the result of a search.
LEARNING_RATES = {"norms": 4e-4, "lora": 3e-4, "all": 2e-5}


class Logits(Step):
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
    recovers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True
    uses_selection: ClassVar[bool] = True

    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    alpha: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    train: Literal["all", "norms", "lora"] = "norms"
    tokens: int = Field(65536, ge=2)
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch: int = Field(4, ge=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    lora_rank: int = Field(16, ge=1)
    selection_tokens: int = Field(8192, ge=2)
    checks: int = Field(4, ge=1)

    def check(self, facts: Facts) -> None:
        """Refuse a LoRA recipe before weights load where peft is not installed."""
        import importlib.util

        if self.train == "lora" and importlib.util.find_spec("peft") is None:
            raise RecipeError(f"{self.name}: train=lora needs peft: pip install 'compress-toolkit[distill]'")

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error the weights are as they were."""
        from compress.steps.distill import _network as net

        net.trained_tensors(model, self.train)
        teacher = net.Network(self._teacher(model, context).module, learns=False)
        with net.training(model, self.train, self.lora_rank, context.seed) as parameters:
            student = net.Network(model.module, learns=True)
            ruler = _Ruler(teacher, _first(context.selection, self.selection_tokens))
            best = before = ruler.divergence(student)
            best_step, best_values = 0, net.snapshot(parameters)
            steps = plan_batches(context.calibration, self.tokens, self.batch, context.seed)
            due = {len(steps) * (i + 1) // self.checks for i in range(self.checks)}
            for step in self._optimize(student, teacher, parameters, steps, model.masks, context):
                if step in due and (now := ruler.divergence(student)) < best:
                    best, best_step, best_values = now, step, net.snapshot(parameters)
            net.restore(parameters, best_values)
        context.notes.append(
            f"{self.name}: KL to the baseline {before:.4f} → {best:.4f} nats per token on {ruler.tokens} "
            f"selection tokens; kept those after step {best_step} of {len(steps)} ({self.tokens} tokens)"
        )

    def _teacher(self, model: Model, context: Context) -> Model:
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

    def _optimize(
        self,
        student: Network,
        teacher: Network,
        parameters: dict[str, nn.Parameter],
        steps: Sequence[Sequence[Tensor]],
        masks: dict[str, Tensor],
        context: Context,
    ) -> Iterator[int]:
        """Take the optimizer steps, and yield how many are taken after each."""
        import torch

        from compress.numerics.distillation import warm_cosine
        from compress.steps.distill._network import apply_masks

        rate = self.learning_rate or LEARNING_RATES[self.train]
        optimizer = torch.optim.Adam(parameters.values(), lr=rate, betas=(0.9, 0.95))
        for step, windows in enumerate(steps):
            optimizer.zero_grad()
            loss = self._backward(student, teacher, windows)
            apply_masks(masks, {n: p.grad for n, p in parameters.items() if p.grad is not None})
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.clip)
            if not (loss < float("inf") and bool(torch.isfinite(norm))):
                raise NumericalError(f"{self.name}: loss {loss}, gradient norm {float(norm)} at step {step + 1}")
            optimizer.param_groups[0]["lr"] = rate * warm_cosine(step, len(steps), max(1, len(steps) // 10))
            optimizer.step()
            apply_masks(masks, parameters)
            context.progress(f"step {step + 1}/{len(steps)}, loss {loss:.4f}", (step + 1) / len(steps))
            yield step + 1

    def _backward(self, student: Network, teacher: Network, windows: Sequence[Tensor]) -> float:
        """Mean loss over the windows' scored positions, its gradient accumulated; one window at a time."""
        import torch

        from compress.numerics.distillation import backward_through_heads

        positions = sum(len(window) - 1 for window in windows)
        total = 0.0
        for window in windows:
            with torch.no_grad():
                target = teacher.hidden(window)[:-1]
            total += backward_through_heads(
                student.hidden(window)[:-1], target, student.head, teacher.head,
                window[1:], self.temperature, self.alpha, scale=1 / positions,
            )  # fmt: skip
        return total / positions


class _Ruler:
    """Mean KL to the teacher over fixed windows; the teacher runs once."""

    def __init__(self, teacher: Network, windows: Sequence[Tensor]):
        import torch

        self.windows, self.teacher = windows, teacher
        self.tokens = sum(map(len, windows))
        with torch.no_grad():  # the head rounds its input to bfloat16 anyway
            self.targets = [teacher.hidden(window).bfloat16() for window in windows]

    def divergence(self, student: Network) -> float:
        """Nats per token; raises NumericalError if it is not finite."""
        import torch

        from compress.numerics.distillation import divergence_through_heads

        total = 0.0
        with torch.no_grad():
            for window, target in zip(self.windows, self.targets, strict=True):
                hidden = student.hidden(window)
                total += divergence_through_heads(hidden, target, student.head, self.teacher.head)
        if not total < float("inf"):
            raise NumericalError(f"{Logits.name}: the divergence on the selection data is {total}")
        return total / self.tokens


def plan_batches(windows: Sequence[Tensor], tokens: int, batch: int, seed: int) -> list[list[Tensor]]:
    """Windows of each optimizer step: seeded shuffles of all windows, one after another, up to `tokens`.

    The last window is cut to fit the budget; a rest of one token, which predicts nothing, is left unused.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    usable = [window for window in windows if len(window) > 1]
    if not usable:
        raise RecipeError(f"{Logits.name}: no calibration window has two tokens")
    order: list[Tensor] = []
    left = tokens
    while left > 1:
        for i in torch.randperm(len(usable), generator=generator).tolist():
            if left > 1:
                order.append(usable[i][:left])
                left -= len(order[-1])
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def _first(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The leading windows, the last one cut, that hold `tokens` together (or all there are)."""
    chosen: list[Tensor] = []
    for window in windows:
        if tokens > 0:
            chosen.append(window[:tokens])
            tokens -= len(chosen[-1])
    return chosen
