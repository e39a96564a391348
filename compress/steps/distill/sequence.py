"""Sequence-level knowledge distillation: the student trains on sequences that the teacher wrote."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from compress.errors import NumericalError
from compress.interfaces import Context
from compress.steps.distill._fields import Generation

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model
    from compress.steps.distill._network import Network

ROWS = 32  # sequences written at once: 190 MB of keys and values at 30 layers of 192 channels and 128 tokens


class Sequence(Generation):
    """Train on cross-entropy of sequences that the baseline has written after beginnings of calibration windows.

    The teacher writes as many sequences as `tokens` can hold, one per window at most; they are read in a seeded
    random order until `tokens`, prompts included, are read, and only what was written is scored. It writes before
    training, and teacher and student are never in memory together.
    Kim and Rush 2016, arXiv:1606.07947, who take the teacher's likeliest sequence by beam search as all of its
    distribution; a sample is an unbiased estimate of the loss over that distribution, and does not repeat itself.
    """

    name: ClassVar[str] = "distill.sequence"

    def apply(self, model: Model, context: Context) -> None:
        """Train in place; on any error the weights are as they were."""
        from compress.steps.distill import _network as net
        from compress.steps.distill._lessons import Text, set_aside
        from compress.steps.distill._training import Ruler, first, plan_batches

        self.check(model.facts)
        net.trained_tensors(model, self.train)
        teacher = self.opened(model, context)
        ends, prompts = teacher.eos_ids, self.prompts(context)
        with set_aside(model.module):
            network = net.Network(teacher.module, learns=False)
            ruler = Ruler(self.name, network, first(context.selection, self.selection_tokens))
            written = self._written(network, prompts, ends, context)
            network.release_body()
            self.dismiss(teacher, context)
        batches = plan_batches(self.name, written, self.tokens, self.batch, context.seed, self.prompt_tokens)
        outcome = self.fit(model, context, Text(self.prompt_tokens), ruler, batches)
        new = sum(len(window) - self.prompt_tokens for window in written)
        context.notes.append(
            f"{self.name}: {outcome} ({self.tokens} tokens); the baseline wrote {new} tokens in "
            f"{len(written)} sequences"
        )

    def _written(self, network: Network, prompts: list[Tensor], ends: frozenset[int], context: Context) -> list[Tensor]:
        """A sequence per prompt, of as many prompts as the budget of tokens reaches if none ends early."""
        import torch

        from compress.steps.distill._sampling import write

        generator = torch.Generator().manual_seed(context.seed)
        wanted = math.ceil(self.tokens / (self.prompt_tokens + self.new_tokens))
        order = torch.randperm(len(prompts), generator=generator)[:wanted].tolist()
        written: list[Tensor] = []
        for start in range(0, len(order), ROWS):
            rows = [prompts[i] for i in order[start : start + ROWS]]
            try:
                written += write(network, rows, self.new_tokens, self.sampling_temperature, ends, generator)
            except NumericalError as error:
                raise NumericalError(f"{self.name}: {error}") from error
            context.progress(f"the baseline wrote sequence {len(written)}/{len(order)}", len(written) / len(order))
        return written
