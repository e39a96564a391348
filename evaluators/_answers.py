"""What evaluators of written answers share: room in the context, and how likely a model finds an answer."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import GateInconclusive
from compress.interfaces import LanguageModel, Score


def check_room(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises GateInconclusive where the longest prompt leaves no room for an answer."""
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if longest > model.context_length:
        raise GateInconclusive(
            f"a prompt and {max_new_tokens} new tokens are {longest} tokens, and the model's context holds "
            f"{model.context_length}"
        )


def nats_per_token(
    model: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """−ln P(answer | prompt) per token, in one pass each; NaN where a row of logits holds one."""
    import torch

    from compress.numerics.divergence import token_nll

    windows = [[*prompt, *answer][:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    found = []
    for rows, prompt, answer in zip(model.logits(windows), prompts, answers, strict=True):
        nll = token_nll(rows[len(prompt) - 1 :], torch.tensor(answer))
        found.append(float(nll.mean()))
    return found


def ids(score: Score) -> list[int]:
    """The answer's tokens, kept as the score's positions."""
    return [int(token) for token in score.positions]
