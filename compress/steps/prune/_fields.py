"""The fields that unstructured pruning steps share, and what each linear is to lose."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.errors import RecipeError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model
    from compress.numerics.masks import Target
    from compress.steps.prune._allocation import Part

Pattern = Literal["2:4", "4:8"]
Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class WeightPruning(Step):
    """Which weights go: a fraction `sparsity` of them, or all but N of every M that a `pattern` "N:M" keeps.

    layers: glob over module names → a sparsity or a pattern of their own; the last match wins, 0 exempts.
    allocation: how blocks share `sparsity`: `uniform`; `owl`, less where more weights are outliers (Yin et al. 2023,
    arXiv:2310.05175, with their M = `outlier`); or `sensitivity`, less where pruning a block alone costs more KL per
    weight, linearly in its logarithm: where that rises with sparsity alike in all blocks, as it nearly does, this is
    how the sum of their KL is least (Lagrange). Sparsities of blocks differ by at most 2 · `spread`. Linears named
    under `layers` keep what is written there and take no part, neither pruned while measuring nor counted; the others
    lose `sparsity` of all their weights together, to less than one weight per compared set, earlier masks counted.
    """

    masks: ClassVar[bool] = True

    sparsity: Sparsity | None = None
    pattern: Pattern | None = None
    layers: dict[str, Sparsity | Pattern] = Field(default_factory=dict)
    allocation: Literal["uniform", "owl", "sensitivity"] = "uniform"
    spread: float = Field(0.08, gt=0, lt=0.5, allow_inf_nan=False)
    outlier: float = Field(5.0, gt=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            both = self.sparsity is not None
            found = f"both sparsity={self.sparsity} and pattern={self.pattern}" if both else "neither"
            raise ValueError(f"found {found}; expected either a sparsity or a pattern")
        if self.allocation != "uniform" and self.sparsity is None:
            raise ValueError(f"allocation={self.allocation} with pattern={self.pattern}, which is the same everywhere")
        return self

    def check(self, facts: Facts) -> None:
        """Refuse globs that match nothing, patterns that do not divide, and allocations that mean nothing here."""
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
        if self.allocation == "uniform":
            return
        if facts.labels and self.allocation == "sensitivity":
            raise RecipeError("allocation=sensitivity reads next tokens, and this model has none; use owl or uniform")
        if len(self.own_targets(facts)) == len(facts.linears):
            raise RecipeError(f"allocation={self.allocation}, but layers names every linear; leave some to share it")

    def masked(self, facts: Facts) -> set[str]:
        """All but those whose target is 0."""
        return {tensor for tensor, target in self.targets(facts).items() if target}

    def set_size(self, n: int, m: int) -> int:
        """How many weights of a matrix (n, m) a sparsity compares with each other: those of one output."""
        return m

    def scores(self, block: Block) -> dict[str, Tensor]:
        """What `sensitivity` prunes a block by, to measure it, lowest first: (n, m) by tensor name."""
        from compress.steps.prune._allocation import wanda_scores_of

        return wanda_scores_of(block)

    def begin(self, model: Model, context: Context) -> dict[str, Target]:
        """The targets of this model; raises RecipeError where it or the context does not allow them."""
        from compress.steps.prune._record import refuse_encoded

        self.check(model.facts)
        targets = self.targets(model.facts)
        refuse_encoded(model, list(targets), self.name)
        if self.uses_calibration and not context.calibration:
            raise RecipeError(f"{self.name} needs calibration data; add data.calibration to the recipe")
        return targets

    def allocated(self, model: Model, context: Context) -> dict[str, Target]:
        """`begin`, with each block's share of the sparsity."""
        from compress.numerics.allocation import highest_within, spread_sparsity
        from compress.numerics.counts import pruned_count
        from compress.steps.prune._allocation import parts

        targets = self.begin(model, context)
        if self.allocation == "uniform" or not self.sparsity:
            return targets
        own = self.own_targets(model.facts)
        among = parts(model, [tensor for tensor in targets if tensor not in own], self.set_size)
        weights = sum(part.size for part in among)
        budget = pruned_count(self.sparsity, weights)

        def pruned(shares: Sequence[float]) -> int:
            return sum(part.pruned(share) for part, share in zip(among, shares, strict=True))

        shares = [0.0] * len(among)
        if pruned(shares) < budget:  # by earlier steps
            # What all would lose alike: less than the sparsity where an earlier step took more from some.
            centre = highest_within(lambda s: pruned([s] * len(among)), budget, 0.0, self.sparsity)
            plain = spread_sparsity(self.worth(model, context, among, centre), centre, self.spread)

            def shifted(by: float) -> list[float]:
                return [min(max(share + by, 0.0), 1 - 1e-9) for share in plain]

            shares = shifted(highest_within(lambda by: pruned(shifted(by)), budget, -1.0, 1.0))
        listed = ", ".join(f"{p.index} {p.pruned(share) / p.size:.3f}" for p, share in zip(among, shares, strict=True))
        lost = pruned(shares)
        context.notes.append(
            f"{self.name}: sparsity per block by {self.allocation}: {listed}; "
            f"in all {lost} of the {weights} weights that share it ({lost / weights:.2%})"
        )
        return targets | {t: share for part, share in zip(among, shares, strict=True) for t in part.tensors}

    def worth(self, model: Model, context: Context, among: Sequence[Part], sparsity: float) -> list[float]:
        """What each part is spared by: its share of outliers, or ln of the KL that it costs alone per weight."""
        from compress.steps.prune._allocation import outlier_shares, sensitivities

        if self.allocation == "owl":
            return outlier_shares(model, context.calibration, among, self.outlier, context.progress)

        def masks(block: Block, part: Part) -> dict[str, Tensor]:
            scores = self.scores(block)
            return {tensor: self._mask(model, tensor, scores[tensor], sparsity) for tensor in part.tensors}

        return sensitivities(model, context.calibration, among, masks, context.progress)

    def _mask(self, model: Model, tensor: str, scores: Tensor, target: Target) -> Tensor:
        """What `scores` (n, m) leave of a matrix, by the target and the masks of earlier steps."""
        from compress.numerics.masks import keep
        from compress.steps.prune._record import require_finite

        size = self.set_size(*scores.shape)
        kept = model.masks.get(tensor)
        sets = require_finite(scores, tensor, self.name).reshape(-1, size)
        return keep(sets, target, None if kept is None else kept.reshape(-1, size)).view(scores.shape)

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
