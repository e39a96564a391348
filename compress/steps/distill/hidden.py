"""Hidden-state matching: blocks of the student learn what blocks of the baseline compute, beside the logits."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.distill._fields import WeightDistillation

if TYPE_CHECKING:
    from compress.architectures import Facts
    from compress.model import Model
    from compress.steps.distill._relations import Relating

Index = Annotated[int, Field(ge=0)]
Pair = Annotated[list[Index], Field(min_length=2, max_length=2)]


class Hidden(WeightDistillation):
    """Train on the loss of distill.logits plus `weight` times the error of hidden states, block by block.

    layers: pairs of a student's block and the baseline's whose output it learns, counted from 0; by default each
    of the student's n blocks learns from the one at the same share of the baseline's depth, the last from the last.
    The error of a token is ‖P h − t‖² / ‖t‖², averaged over pairs and tokens; the division, which the papers lack,
    keeps the few tokens of enormous states from deciding it all. P is the identity where widths agree; else a matrix
    per pair, which starts as the least-squares fit on the selection data, learns at `projection_rate`, and is
    dropped after training.
    relations: the weight of a further loss, the divergence of the relations of queries, of keys and of values: of each
    token with those before it, softmax(x_i · x_j / √d) in `relation_heads` heads (by default the baseline's of keys and
    values), in the last of the pairs of blocks. It needs no projection, whatever the widths.
    Romero et al. 2015, FitNets, arXiv:1412.6550; Jiao et al. 2020, TinyBERT, arXiv:1909.10351;
    relations: Wang et al. 2021, MiniLMv2, arXiv:2012.15828.
    """

    name: ClassVar[str] = "distill.hidden"

    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    alpha: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    divergence: Literal["forward", "reverse", "js"] = "forward"
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    layers: list[Pair] | None = Field(None, min_length=1)
    relations: float = Field(0.0, ge=0, allow_inf_nan=False)
    relation_heads: int | None = Field(None, ge=1)
    projection_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)

    def check(self, facts: Facts) -> None:
        """Refuse, before weights load, blocks that the student does not have, and relations of what is one matrix."""
        super().check(facts)
        if self.relations and "qkv" in {out for out, _ in facts.architecture.linears.values()}:
            raise RecipeError(
                f"{self.name}: relations compare queries, keys and values, which are one matrix in a "
                f"{facts.architecture.model_type}; set relations: 0"
            )
        for student, _ in self.layers or []:
            if student >= facts.layers:
                raise RecipeError(
                    f"{self.name}: layers names the student's block {student}, and it has {facts.layers}, "
                    f"0 to {facts.layers - 1}"
                )

    def pairs(self, student: Facts, teacher: Facts) -> list[tuple[int, int]]:
        """Blocks of the student with those they learn from; raises RecipeError for one that there is not."""
        self.check(student)
        if self.layers is None:
            n, m = student.layers, teacher.layers
            return [(i, (i + 1) * m // n - 1) for i in range(n)] if n <= m else [(i, i * m // n) for i in range(n)]
        for _, block in self.layers:
            if block >= teacher.layers:
                raise RecipeError(
                    f"{self.name}: layers names the baseline's block {block}, and it has {teacher.layers}, "
                    f"0 to {teacher.layers - 1}"
                )
        return [(student_block, block) for student_block, block in self.layers]

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error the weights are as they were."""
        from compress.steps.distill import _network as net
        from compress.steps.distill._lessons import Reading
        from compress.steps.distill._states import Matching, States, fitted_projections
        from compress.steps.distill._training import Ruler, first, plan_batches

        net.trained_tensors(model, self.train)
        baseline = self.opened(model, context)
        pairs = self.pairs(model.facts, baseline.facts)
        teacher = net.Network(baseline.module, learns=False)
        selection = first(context.selection, self.selection_tokens)
        ruler = Ruler(self.name, teacher, selection)
        batches = plan_batches(self.name, context.calibration, self.tokens, self.batch, context.seed)
        with ExitStack() as stack:
            own = stack.enter_context(States(model, [s for s, _ in pairs]))
            theirs = stack.enter_context(States(baseline, [t for _, t in pairs]))
            projections = {}
            if model.facts.sizes["residual"] != baseline.facts.sizes["residual"]:
                student = net.Network(model.module, learns=False)
                projections = fitted_projections(self.name, student, own, teacher, theirs, selection)
            relating = self._relating(model, baseline, pairs[-1], stack) if self.relations else None
            reading = Reading(teacher, self.temperature, self.alpha, self.divergence)
            lesson = Matching(reading, own, theirs, list(projections.values()), self.weight, relating)
            outcome = self.fit(model, context, lesson, ruler, batches, projections, self.projection_rate)
        through = f" through {len(projections)} projections, now dropped" if projections else ""
        said = ", ".join(f"{s} from {t}" for s, t in pairs)
        context.notes.append(f"{self.name}: {outcome} ({self.tokens} tokens); blocks learned: {said}{through}")

    def _relating(self, model: Model, baseline: Model, pair: tuple[int, int], stack: ExitStack) -> Relating:
        """The loss on the attention of a pair of blocks, which are watched as long as the stack is open."""
        from compress.steps.distill._relations import Projected, Relating, relation_heads

        heads = relation_heads(self.name, self.relation_heads, model.facts, baseline.facts)
        own, theirs = Projected(model, [pair[0]]), Projected(baseline, [pair[1]])
        return Relating(stack.enter_context(own), stack.enter_context(theirs), heads, self.relations)
