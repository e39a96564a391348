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

    def masked(self, facts: Facts) -> set[str]:
        """All but those whose target is 0."""
        return {tensor for tensor, target in self.targets(facts).items() if target}

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


class CalibratedPruning(WeightPruning):
    """WeightPruning of steps that see calibration data, and may share the sparsity out among the blocks.

    allocation: `uniform`; `owl`, less where more weights are outliers (Yin et al. 2023, arXiv:2310.05175, with their
    M = `outlier`); or `sensitivity`, less where pruning a block alone costs more KL. Sparsities of blocks differ by at
    most 2 · `spread`, with the mean as written; `layers` stands above all of them.
    """

    uses_calibration: ClassVar[bool] = True

    allocation: Literal["uniform", "owl", "sensitivity"] = "uniform"
    spread: float = Field(0.08, gt=0, lt=0.5, allow_inf_nan=False)
    outlier: float = Field(5.0, gt=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _allocation_fits(self) -> Self:
        if self.allocation != "uniform" and self.sparsity is None:
            raise ValueError(f"allocation={self.allocation} with pattern={self.pattern}, which is the same everywhere")
        return self

    def check(self, facts: Facts) -> None:
        """Refuse, besides, a sensitivity where there are no next tokens to measure it on."""
        super().check(facts)
        if facts.labels and self.allocation == "sensitivity":
            raise RecipeError("allocation=sensitivity reads next tokens, and this model has none; use owl or uniform")

    def allocated(self, model: Model, context: Context) -> dict[str, Target]:
        """`begin`, with each block's share of the sparsity."""
        from compress.numerics.allocation import spread_sparsity
        from compress.steps.prune._allocation import outlier_shares, sensitivities

        targets = self.begin(model, context)
        if self.allocation == "uniform" or not self.sparsity:
            return targets
        if self.allocation == "owl":
            worth = outlier_shares(model, context.calibration, self.outlier, context.progress)
        else:
            worth = sensitivities(model, context.calibration, self.sparsity, context.progress)
        shares = spread_sparsity(worth, self.sparsity, self.spread)
        listed = ", ".join(f"{share:.3f}" for share in shares)
        context.notes.append(f"{self.name}: sparsity per block by {self.allocation}: {listed}")
        blocks = model.facts.architecture.blocks
        own = self.own_targets(model.facts)
        return {t: own.get(t, shares[int(t.removeprefix(f"{blocks}.").split(".")[0])]) for t in targets}


def _target(written: float | Pattern) -> Target:
    """The number itself, or a pattern's two numbers.

    >>> _target("2:4"), _target(0.5)
    ((2, 4), 0.5)
    """
    if isinstance(written, str):
        n, m = written.split(":")
        return int(n), int(m)
    return written
