"""What linears read of the residual stream, and a model with fewer of its channels."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.blocks import walk
from compress.families import Encoder
from compress.numerics.hessian import Hessian
from compress.numerics.neurons import channel_scores, with_constant
from compress.steps.prune._structure import remember, select_axis, select_channels, tell

if TYPE_CHECKING:
    from compress.architectures import Facts
    from compress.interfaces import Progress
    from compress.model import Model


@dataclass
class Reading:
    """Linears that read the same states over the calibration tokens.

    free: their weights may change (those of a head tied to the embedding may not). biased: some of them have a bias.
    hessian: second moments of the states, where biased with a constant channel behind them.
    """

    readers: tuple[str, ...]
    free: bool
    biased: bool
    hessian: Hessian

    def add(self, X: Tensor, counts: Tensor | None) -> None:
        """States of some tokens, (tokens, channels), and what each of these counts, (tokens, 1); None: all alike."""
        X = with_constant(X) if self.biased else X
        self.hessian.add(X if counts is None else X * counts.sqrt())


@dataclass
class Norm:
    """A norm as wide as the residual stream, over the calibration tokens.

    energy: (residual,) Σ x_j² / mean(x²) over tokens of the states before it, about their mean where the norm centres
    them. reading: of its output; None where the stream takes that. counts: (tokens,), what each token counts.
    """

    name: str
    centred: bool
    energy: Tensor
    reading: Reading | None
    counts: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, normed: Tensor) -> None:
        """States before and after the norm, (tokens, residual) each. Where all are 0, no channel has a share."""
        counts = None if self.counts is None else self.counts[self.tokens : self.tokens + len(x), None]
        self.tokens += len(x)
        if self.centred:
            x = x - x.mean(dim=1, keepdim=True)
        size = x.square().mean(dim=1, keepdim=True)
        shares = x.square() / size.where(size > 0, 1.0)
        self.energy += (shares if counts is None else shares * counts).sum(dim=0)
        if self.reading is not None:
            self.reading.add(normed, counts)

    def ratio(self, kept: Tensor) -> float:
        """The root mean square of the channels `kept` over that of all; about the mean of all, where the norm centres.

        The mean of those kept is nearer to them: by one part in twice their number or so, the ratio is too large then.
        """
        whole = float(self.energy.mean())
        return math.sqrt(float(self.energy[kept].mean()) / whole) if whole else 1.0


@torch.inference_mode()
def read(model: Model, windows: Sequence[Tensor], progress: Progress) -> tuple[list[Norm], Reading | None]:
    """The norms, in order those that linears read, then those before the stream; what the head of an encoder reads."""
    facts, arch, module = model.facts, model.facts.architecture, model.module
    added = [f"{arch.blocks}.{i}.{name}" for i in range(facts.layers) for name in arch.post_norms.values()]
    found = [_norm(model, name, readers) for name, readers in facts.readers.items()]
    found[-1].counts = counts = first_tokens(model, windows) if isinstance(arch, Encoder) else None
    found += [_norm(model, name, ()) for name in added]
    hooks = [
        module.get_submodule(norm.name).register_forward_hook(
            lambda _, args, out, n=norm: n.add(args[0].flatten(0, -2).float(), out.flatten(0, -2).float())
        )
        for norm in found
    ]
    try:
        last = deque(walk(model, windows, progress), maxlen=1).pop()  # each but the last runs once, to feed the next
        left = last.advance()
        if not isinstance(arch, Encoder):
            for states in left:
                module.get_submodule(arch.final_norm)(states)
    finally:
        for hook in hooks:
            hook.remove()
    return found, _read_pooled(model, left, counts) if isinstance(arch, Encoder) else None


def first_tokens(model: Model, windows: Sequence[Tensor]) -> Tensor | None:
    """What each token counts for the pooler, (tokens,): texts' first ones, which it reads, as much as all the others.

    These alone are few. None where the windows hold none, or nothing else, and where no token is known to be first.
    """
    if model.tokenizer.cls_token_id is None:
        return None
    first = torch.cat(list(windows)) == model.tokenizer.cls_token_id
    n, k = len(first), int(first.sum())
    return torch.where(first, n / (2 * k), n / (2 * (n - k))) if 0 < k < n else None


def _read_pooled(model: Model, left: Sequence[Tensor], counts: Tensor | None) -> Reading:
    """What an encoder's head reads where its pooler reads the states that leave the last block, of every token."""
    arch = model.facts.architecture
    assert isinstance(arch, Encoder)
    reading, start = _reading(model, (arch.head,), model.facts.sizes["pooled"], arch.head), 0
    pooler = model.module.get_submodule(arch.pooler)
    for states in left:
        pooled: Tensor = getattr(torch, arch.pooling.lower())(pooler(states)).flatten(0, -2)
        reading.add(pooled, None if counts is None else counts[start : start + len(pooled), None])
        start += len(pooled)
    return reading


def _norm(model: Model, name: str, readers: tuple[str, ...]) -> Norm:
    """One that has seen no token yet."""
    width, arch = model.facts.sizes["residual"], model.facts.architecture
    return Norm(name, arch.centred, torch.zeros(width), _reading(model, readers, width, name) if readers else None)


def _reading(model: Model, readers: tuple[str, ...], channels: int, name: str) -> Reading:
    free = not model.facts.tied or readers != (model.facts.architecture.head,)
    biased = any(model.module.get_submodule(reader).bias is not None for reader in readers)
    return Reading(readers, free, biased, Hessian(channels + biased, name))


def scores(model: Model, reading: Reading) -> Tensor:
    """‖W_:j‖₂ · ‖X_j‖₂ per channel of what is read, (channels,), with W all that its readers have."""
    weights = torch.cat([model.module.get_submodule(name).weight.detach() for name in reading.readers])
    channels = weights.shape[1]
    return channel_scores(weights, reading.hessian.matrix[:channels, :channels])


def worth(model: Model, found: Sequence[Norm]) -> Tensor:
    """Per residual channel, the sum over norms of its share in what their readers take from the stream, (residual,)."""
    total = torch.zeros(model.facts.sizes["residual"])
    for norm in found:
        if norm.reading is not None:
            own = scores(model, norm.reading)
            total += own / own.sum()
    return total


def scale_gain(model: Model, norm: str, factor: float) -> None:
    """Multiply what a norm multiplies by, which may be its weight and an offset."""
    name = f"{norm}.weight"
    gain, offset = model.parameter(name).data, model.facts.architecture.offset(name)
    gain.copy_((gain + offset) * factor - offset)


def keep_embedding_scale(model: Model, width: int) -> None:
    """Scale an embedding that transformers multiplies by the root of the width, so that the product stays as it is.

    Where the head is tied to it, the last norm makes up for that.
    """
    if not model.facts.architecture.scaled_embedding:
        return
    factor = math.sqrt(model.facts.sizes["residual"] / width)
    embedding: Any = model.module.get_input_embeddings()
    embedding.weight.data.mul_(factor)
    if hasattr(embedding, "embed_scale"):  # before transformers 5.4, Gemma 1 and 2 read the width from the config
        embedding.scalar_embed_scale = width**0.5
        embedding.embed_scale.fill_(width**0.5)
    if model.facts.tied:
        scale_gain(model, model.facts.architecture.final_norm, 1 / factor)


def narrow(model: Model, after: Facts, kept: Tensor, pooled: Tensor | None) -> None:
    """Keep the residual channels `kept`, and the `pooled` of an encoder, in place, and say so in the config."""
    arch, module = model.facts.architecture, model.module
    head = module.get_submodule(arch.head)
    for name in arch.embeddings:
        _narrow_embedding(module.get_submodule(name), kept)
    if isinstance(arch, Encoder):
        assert pooled is not None
        select_channels(module.get_submodule(arch.pooler), kept, 1)
        select_channels(module.get_submodule(arch.pooler), pooled, 0)
    select_channels(head, kept if pooled is None else pooled, 1)
    if model.facts.tied:
        head.weight = module.get_input_embeddings().weight
    _narrow_norm(module.get_submodule(arch.final_norm), kept)
    for block in module.get_submodule(arch.blocks):
        select_axis(model.facts, block, {"residual": kept})
        for norm in arch.norms:
            _narrow_norm(block.get_submodule(norm), kept)
    remember(module, after)
    tell(module.config, after)
    model.reshaped()


def _narrow_embedding(embedding: Any, kept: Tensor) -> None:
    embedding.weight = nn.Parameter(embedding.weight.detach().index_select(1, kept), embedding.weight.requires_grad)
    embedding.embedding_dim = len(kept)


def _narrow_norm(norm: Any, kept: Tensor) -> None:
    for name, held in list(norm.named_parameters()):  # gain, and bias where it centres
        setattr(norm, name, nn.Parameter(held.detach().index_select(0, kept), held.requires_grad))
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (len(kept),)
