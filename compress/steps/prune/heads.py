"""Fewer attention heads: query heads within their groups, and whole groups with their key and value heads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.errors import RecipeError
from compress.interfaces import Context
from compress.steps.prune._removal import Removal, Sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model


class Heads(Removal):
    """Remove `groups` key/value heads with all their query heads, then `queries` query heads of those that are left.

    The same number goes in every block, and every group that is left keeps equally many query heads, as grouped-query
    attention and the formats need (Ainslie et al. 2023, arXiv:2305.13245). The output projection (o_proj) reads the
    heads: `criterion`, `update` and what follows speak of it; a head's worth is that of its channels together, a
    group's that of its query heads: sums by `wanda` and `taylor`, whose scores add, else roots of summed squares.
    Blocks are cut in order, each fed by the smaller ones before it.
    """

    name: ClassVar[str] = "prune.heads"
    version: ClassVar[int] = 4

    groups: int = Field(0, ge=0)
    queries: int = Field(0, ge=0)

    def check(self, facts: Facts) -> None:
        """Refuse counts that leave no head, or groups of unequal size."""
        from compress.steps.prune._structure import refuse_split_width

        self.check_update(facts)
        if self.groups or self.queries:
            refuse_split_width(facts, self.name)
        groups, per_group = facts.kv_heads - self.groups, facts.heads // facts.kv_heads
        if groups < 1:
            remedy = f"use at most {facts.kv_heads - 1}" if facts.kv_heads > 1 else "leave groups out"
            raise RecipeError(f"groups={self.groups} leaves none of {facts.kv_heads} key/value heads; {remedy}")
        heads = groups * per_group
        most = heads - groups  # a query head stays with each key/value head
        if self.queries >= heads:
            remedies = [f"use at most {most}"] * (most > 0) + ["remove whole groups"] * (groups > 1)
            remedy = ", or ".join(remedies) or "leave queries out"
            raise RecipeError(f"queries={self.queries} leaves none of {heads} query heads; {remedy}")
        if self.queries % groups:
            remedy = f"remove a multiple of {groups}" if most else "remove whole groups"
            raise RecipeError(
                f"queries={self.queries} of {heads} query heads leaves {heads - self.queries}, which {groups} "
                f"key/value heads cannot share evenly; {remedy}"
            )

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """That of the linear that is set anew."""
        return {} if self.update == "none" or self.facts_after(facts) == facts else facts.inputs("q")

    def facts_after(self, facts: Facts) -> Facts:
        """The same model with fewer heads."""
        if not self.groups and not self.queries:
            return facts
        kv_heads = facts.kv_heads - self.groups
        heads = kv_heads * (facts.heads // facts.kv_heads) - self.queries
        sizes = {**facts.sizes, "q": heads * facts.head_size, "kv": kv_heads * facts.head_size}
        return replace(facts, heads=heads, kv_heads=kv_heads, sizes=sizes)

    def apply(self, model: Model, context: Context) -> None:
        """Cut every block in place, then the config."""
        from compress.steps.prune._removal import summed
        from compress.steps.prune._structure import reader_of, refuse_unready, tell

        self.check(model.facts)
        before, after = model.facts, self.facts_after(model.facts)
        if after == before:
            return
        refuse_unready(model, context, self.name)
        reader = reader_of(before.architecture, "q")
        felt = self.felt(model, context, reader, before.head_size)
        part: Any
        config = model.module.config
        smaller = copy.deepcopy(config)
        tell(smaller, after)
        for block, name, sums in summed(model, context, self, reader):
            self._cut(before, after, block, name, sums, felt[block.index])
            for part in block.module.modules():
                if hasattr(part, "config"):  # some read their counts there, while later blocks still have them all
                    part.config = smaller
        tell(config, after)
        for part in model.module.modules():
            if getattr(part, "config", None) is smaller:
                part.config = config
        model.reshaped()
        context.notes.append(
            f"{self.name}: {after.heads} of {before.heads} query heads and {after.kv_heads} of {before.kv_heads} "
            "key/value heads remain in each block"
        )

    def _cut(self, before: Facts, after: Facts, block: Block, name: str, sums: Sums, felt: Tensor | None) -> None:
        """Choose heads by the moments of the inputs of the linear that reads them, then cut those of the attention."""
        from compress.steps.prune._record import require_finite
        from compress.steps.prune._removal import refit
        from compress.steps.prune._structure import kept_heads, remember, select_axis

        linear = block.linears[name]
        scores = self.scores(linear.weight.detach(), sums[0], felt, before.head_size)
        kept = kept_heads(before, after, require_finite(scores, f"{name}.weight", self.name), self.adding)
        if self.update != "none":
            refit(self.name, name, linear, sums, kept["q"], self.ridge)
        select_axis(before, block.module, kept)
        remember(block.module, after)
