"""The fields that unstructured pruning steps share, and what each linear is to lose."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from compress.architectures import Facts
    from compress.model import Model
    from compress.numerics.masks import Target

Pattern = Literal["2:4", "4:8"]
Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class WeightPruning(Step):
    """Which weights go: a fraction `sparsity` of them, or all but N of every M that a `pattern` "N:M" keeps.

    layers: glob over module names → a sparsity or a pattern of their own; the last match wins, 0 exempts.
    """

    masks: ClassVar[bool] = True

    sparsity: Sparsity | None = None
    pattern: Pattern | None = None
    layers: dict[str, Sparsity | Pattern] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            both = self.sparsity is not None
            found = f"both sparsity={self.sparsity} and pattern={self.pattern}" if both else "neither"
            raise ValueError(f"found {found}; expected either a sparsity or a pattern")
        return self

    def check(self, facts: Facts) -> None:
        """Refuse globs that match no linear of the blocks, and patterns that do not divide its input channels."""
        for glob in self.layers:
            if not any(fnmatchcase(module, glob) for module in facts.linears):
                example = next(iter(facts.linears))
                raise RecipeError(f"layers: {glob!r} matches no linear of the blocks; names look like {example}")
        for tensor, target in self.targets(facts).items():
            channels = facts.matrices[tensor][1]
            if isinstance(target, tuple) and channels % target[1]:
                raise RecipeError(
                    f"{tensor.removesuffix('.weight')}: {channels} input channels are not a multiple of "
                    f"{target[1]}, as pattern {target[0]}:{target[1]} needs; give it a sparsity under layers"
                )

    def begin(self, model: Model, context: Context) -> dict[str, Target]:
        """The targets of this model; raises RecipeError where it or the context does not allow them."""
        from compress.steps.prune._record import refuse_encoded

        self.check(model.facts)
        targets = self.targets(model.facts)
        refuse_encoded(model, list(targets), self.name)
        if self.uses_calibration and not context.calibration:
            raise RecipeError(f"{self.name} needs calibration data; add data.calibration to the recipe")
        return targets

    def targets(self, facts: Facts) -> dict[str, Target]:
        """Tensor name → what it is to lose, for every linear of the blocks; a pattern as (N, M)."""
        default = self.sparsity if self.pattern is None else self.pattern
        assert default is not None
        return {f"{module}.weight": _target(default) for module in facts.linears} | self.own_targets(facts)

    def own_targets(self, facts: Facts) -> dict[str, Target]:
        """Those of `targets` that `layers` names."""
        found: dict[str, Target] = {}
        for glob, own in self.layers.items():
            found |= {f"{m}.weight": _target(own) for m in facts.linears if fnmatchcase(m, glob)}
        return found


def _target(written: float | Pattern) -> Target:
    """The number itself, or a pattern's two numbers.

    >>> _target("2:4"), _target(0.5)
    ((2, 4), 0.5)
    """
    if isinstance(written, str):
        n, m = written.split(":")
        return int(n), int(m)
    return written
