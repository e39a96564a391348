"""What the steps that remove inner channels share: how a channel is judged, and how the rest makes up for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.errors import NumericalError
from compress.interfaces import Context, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from compress.architectures import Facts
    from compress.blocks import Block
    from compress.model import Model

TINY = 1e-12  # of a root mean square: a stream of zeros divides by it
SHIFT = 100  # the first tokens of a vocabulary, single bytes among them, are drawn about alike

Criterion = Literal["activation", "wanda", "fisher", "taylor"]
Update = Literal["none", "output", "stream"]
Sums = tuple["Tensor", "Tensor | None"]
"""Of `moments`."""


class Removal(Step):
    """Channels between two linears of a submodule: what decides who stays, and the update of the linear that reads.

    criterion: a channel's worth over the calibration tokens, with W the reading linear and X its inputs, each token's
    divided by the size of the residual stream that it is added to: `activation` ‖W_:j‖₂ · ‖X_j‖₂, `wanda`
    Σ_i |W_ij| · ‖X_j‖₂, `fisher` √(W_:jᵀ G W_:j) · ‖X_j‖₂ with G the mean of g gᵀ / ‖g‖² over tokens and g the
    loss's gradient by W's output, or `taylor` Σ_t |x_tj ∂L/∂x_tj|, whose inputs are taken as they are.
    update: the reading linear's other weights and its bias are set by least squares to come nearest to its own old
    output on the present inputs (`output`), or to what brings the residual stream back to that of the model before this
    step (`stream`), which also makes up for what earlier blocks have lost. A ridge holds the weights, not the bias.
    ridge: λ as a fraction of the mean diagonal of the inputs' second moments.
    random_tokens: windows of tokens drawn from the whole vocabulary by Zipf's law join the calibration, so many per
    token of it to the nearest whole window, so that channels count which answer to what its texts lack. Gradients are
    of the calibration alone, for `fisher` of its first 28 tokens per output of W; the loss of a classifier is that of
    classes drawn from its own probabilities.
    inverse_frequency: a token that is n times in the calibration counts (1 + n)^−p in ‖X_j‖₂ and in least squares, at 0
    all alike; gradients are not weighed. Mikolov et al. 2013, arXiv:1310.4546, leave frequent words out to the power ½.
    """

    reshapes: ClassVar[bool] = True
    classifiers: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    criterion: Criterion = "activation"
    update: Update = "output"
    ridge: float = Field(0.01, gt=0, lt=1, allow_inf_nan=False)
    random_tokens: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    inverse_frequency: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)

    @property
    def adding(self) -> bool:
        """Whether scores by this criterion add; others are norms, of which the squares do."""
        return self.criterion in ("wanda", "taylor")

    @property
    def twins(self) -> bool:  # type: ignore[override]
        """Whether the model as it was says what the stream should be."""
        return self.update == "stream"

    def tokens_read(self, tokens: float) -> float:
        """With those drawn at random."""
        return tokens * (1 + self.random_tokens)

    def gradient_bytes(self, facts: Facts) -> int:
        """Of every block, second moments of W's output (`fisher`), or scores, at most of each channel (`taylor`)."""
        kept = {"fisher": facts.sizes["residual"] ** 2, "taylor": facts.sizes["mlp"]}
        return 4 * facts.layers * kept.get(self.criterion, 0)

    def check_update(self, facts: Facts) -> None:
        """Refuse the update that a norm behind the reading linear makes meaningless."""
        from compress.steps.prune._structure import refuse_post_norms

        if self.update == "stream":
            refuse_post_norms(facts, self.name)

    def scores(self, W: Tensor, H: Tensor, felt: Tensor | None, size: int = 1) -> Tensor:
        """Worth of each `size` neighbouring channels, (m / size,). W: (n, m). H: of `moments`. felt: of `felt`."""
        from compress.numerics.neurons import channel_scores, fisher_channel_scores, together, wanda_channel_scores

        if self.criterion == "taylor" and felt is not None:
            return felt
        H = H[: W.shape[1], : W.shape[1]]  # without a constant channel
        if self.criterion == "wanda":
            single = wanda_channel_scores(W, H)
        else:
            single = channel_scores(W, H) if felt is None else fisher_channel_scores(W, H, felt)
        return together(single.view(-1, size), self.adding)

    def felt(self, model: Model, context: Context, linear: str, size: int = 1) -> Sequence[Tensor | None]:
        """What the criterion takes from gradients, per block: Taylor scores, G of `fisher`, or None."""
        from compress.classifier import texts_of
        from compress.steps.prune._fisher import output_fisher
        from compress.steps.prune._taylor import taylor_scores

        if self.criterion not in ("fisher", "taylor"):
            return [None] * model.facts.layers
        texts = texts_of(model, context.calibration)
        if self.criterion == "taylor":
            return taylor_scores(model, texts, linear, size, context.progress, context.seed)
        return output_fisher(model, texts, linear, context.progress, context.seed)


def refit(step: str, name: str, linear: nn.Linear, sums: Sums, kept: Tensor, ridge: float) -> None:
    """Write into a linear, at full width still, what least squares give its kept input channels (k,), and its bias.

    sums: of its inputs; where it has a bias, with a constant channel behind them. Raises NumericalError naming it.
    """
    import torch

    from compress.numerics.neurons import compensated
    from compress.steps.prune._record import require_finite

    W, (H, missing), left = linear.weight.detach(), sums, kept
    if constant := int(linear.bias is not None):
        left = torch.cat([kept, torch.tensor([W.shape[1]])])
        W = torch.cat([W, linear.bias.detach()[:, None]], dim=1)
    H = H[: W.shape[1], : W.shape[1]]
    try:
        V = require_finite(compensated(W, H, left, ridge, missing, constant), f"{name}.weight", step)
    except NumericalError as error:
        raise NumericalError(f"{name}.weight: {error}") from None
    linear.weight.data[:, kept] = V[:, : len(kept)]
    if constant:
        linear.bias.data.copy_(V[:, -1])


def random_windows(model: Model, windows: Sequence[Tensor], share: float, seed: int) -> list[Tensor]:
    """Windows (length,) int64 of tokens that are not special, each drawn alone: `share` times as many as `windows`.

    Token i is drawn in proportion to 1 / (i + SHIFT), Zipf's law as Mandelbrot 1953 shifts it. The number stands for
    the rank: byte pairs are merged the most frequent first (Sennrich et al. 2016, arXiv:1508.07909).
    """
    import torch

    count = round(share * len(windows))
    if count == 0:
        return []
    special, length = set(model.tokenizer.all_special_ids), len(windows[0])
    plain = torch.tensor([i for i in range(min(len(model.tokenizer), model.facts.vocabulary)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(1 / (plain.double() + SHIFT), count * length, replacement=True, generator=generator)
    return list(plain[drawn].view(count, length))


def rarity(windows: Sequence[Tensor], others: Sequence[Tensor], power: float) -> Tensor | None:
    """What each token of windows and others counts, in order, (tokens,) float32; None where all count alike.

    A token of the windows counts (1 + how often it is among them)^−power over the mean of that, one of the others 1.
    """
    import torch

    if power == 0:
        return None
    tokens = torch.cat(list(windows))
    found = (torch.bincount(tokens) + 1.0)[tokens] ** -power
    return torch.cat([found / found.mean(), torch.ones(sum(map(len, others)))])


def summed(model: Model, context: Context, step: Removal, reader: str) -> Iterator[tuple[Block, str, Sums]]:
    """The blocks in order, each with the name of its closing linear `reader` and the `moments` of that one's inputs."""
    from compress.blocks import walk
    from compress.steps.prune._structure import twin_of

    drawn = random_windows(model, context.calibration, step.random_tokens, context.seed)
    if step.random_tokens and not drawn:
        few = f"{step.random_tokens} of {len(context.calibration)} windows is no more than half a one"
        context.notes.append(f"{step.name}: without random tokens, as {few}")
    counts, windows = rarity(context.calibration, drawn, step.inverse_frequency), [*context.calibration, *drawn]
    twins = walk(twin_of(model), windows) if step.update == "stream" else None
    for block in walk(model, windows, context.progress):
        name = f"{model.facts.architecture.blocks}.{block.index}.{reader}"
        wanted = None
        if twins is not None:  # the residual stream behind the linear of the model as it was
            wanted = (after for _, _, after in next(twins).around(name, last=True))
        yield block, name, moments(block, name, wanted, counts)


def moments(block: Block, reader: str, wanted: Iterable[Tensor] | None, counts: Tensor | None = None) -> Sums:
    """Σ x xᵀ (m, m) of a closing linear's inputs, and Σ d xᵀ (n, m), with d what the residual stream behind it lacks.

    Where the linear has a bias, x has a constant channel behind its own, and m is one more.
    wanted: that stream as it should be, (tokens, n) per batch; None: nothing is lacking, as None says in turn.
    Each token counts by the inverse mean square of that stream: the norms that read it divide by its root, so that an
    error weighs by what it adds to the stream, and the few tokens of massive activations do not decide for all.
    counts: (tokens,), what each token counts besides.
    """
    from compress.numerics.hessian import Hessian
    from compress.numerics.neurons import with_constant

    linear = block.linears[reader]
    biased = linear.bias is not None
    hessian = Hessian(linear.in_features + biased, reader)
    missing = None if wanted is None else linear.weight.new_zeros(linear.out_features, linear.in_features + biased)
    targets = None if wanted is None else iter(wanted)
    read = 0
    for X, _, after in block.around(reader):
        target = after if targets is None else next(targets)
        size = target.square().mean(dim=1, keepdim=True).sqrt().clamp(min=TINY)
        if counts is not None:
            size /= counts[read : read + len(X), None].sqrt()
            read += len(X)
        X = (with_constant(X) if biased else X) / size
        hessian.add(X)
        if missing is not None:
            missing.addmm_(((target - after) / size).T, X)
    return hessian.matrix, missing
