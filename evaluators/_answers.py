"""What evaluators of written answers share: room in the context, and how likely a model finds an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Written:
    """A greedy answer: its tokens, their nats per token under the model that wrote them, and its text."""

    tokens: tuple[int, ...]
    nats: float
    text: str


def written(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Written]:
    """Answers to the prompts, in their order; the token that ends one is no part of its text."""
    check_room(model, prompts, max_new_tokens)
    answers = [tuple(model.generate(prompt, max_new_tokens)) for prompt in prompts]
    texts = [model.decode(answer[:-1] if answer[-1] in model.eos_ids else answer) for answer in answers]
    nats = nats_per_token(model, prompts, answers)
    return [Written(*row) for row in zip(answers, nats, texts, strict=True)]


def ids(score: Score) -> list[int]:
    """The answer's tokens, kept as the score's positions."""
    return [int(token) for token in score.positions]
