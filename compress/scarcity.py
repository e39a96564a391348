"""Too little calibration for what a step solves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.architectures import Facts
    from compress.interfaces import Step


def scarcity(step: Step, facts: Facts, tokens: float) -> str:
    """What must be said where so many calibration tokens are fewer than the channels solved for; else empty."""
    found, tokens = step.solved(facts), step.tokens_read(tokens)
    name = max(found, key=found.__getitem__, default="")
    if not found or tokens >= found[name]:
        return ""
    return (
        f"{tokens:,.0f} calibration tokens for {found[name]:,} input channels of {name}: its Hessian is singular, "
        "and weights are fitted to these few texts, which may serve no other; give data.calibration at least "
        f"{found[name]:,} tokens, better ten times as many"
    )
