"""Too little calibration for what a step solves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.architectures import Facts
    from compress.interfaces import Step


def scarcity(step: Step, facts: Facts, tokens: float) -> str:
    """What must be said where so many calibration tokens are fewer than the channels solved for; else empty."""
    found, tokens = _solved(step, facts), tokens * (1 + getattr(step, "random_tokens", 0))
    name = max(found, key=found.__getitem__, default="")
    if not found or tokens >= found[name]:
        return ""
    return (
        f"{tokens:,.0f} calibration tokens for {found[name]:,} input channels of {name}: its Hessian is singular, "
        "and weights are fitted to these few texts, which may serve no other; give data.calibration at least "
        f"{found[name]:,} tokens, better ten times as many"
    )


def _solved(step: Step, facts: Facts) -> Mapping[str, int]:
    """Reader → input channels that the step fits weights to: not all of what it holds second moments of."""
    held = step.hessians(facts)
    if step.reshapes:
        idle = step.facts_after(facts) == facts or getattr(step, "update", None) is False
        return {} if idle else held
    if not held:
        return {}
    changed = {*step.encodings(facts), *step.masked(facts)}
    stack = facts.stacks[-1]
    places = [f"{stack.blocks}.{i}" for i in range(facts.layers)]
    read = {stage: [f"{p}.{n}.weight" for p in places for n in stage] for stage in stack.stages}
    widths = facts.inputs()
    return {(f := f"{stack.blocks}.0.{s[0]}"): widths[f] for s, names in read.items() if not changed.isdisjoint(names)}
