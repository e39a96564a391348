"""Mixed precision: an encoding for each linear by its sensitivity, within a budget of bits, exactly.

Scores as in Dong et al. 2020, HAWQ-V2, arXiv:1911.03852, with the Fisher information of the model's own output
for the Hessian's trace, and weight by weight instead of on average.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress import methods
from compress.architectures import Facts
from compress.encodings import Encoding
from compress.errors import NumericalError, RecipeError
from compress.interfaces import Context, Step
from compress.plugin import step
from compress.steps.quantize._fields import (
    CodedName,
    EncodingName,
    judged,
    matched,
    refuse_encoded,
    round_to_nearest,
    selected,
)

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model


class Mixed(Step):
    """Each linear of the blocks in one of `choices`, of least expected loss at `target_bits` bits per weight.

    target_bits: over the linears that are chosen for, scales and zero points included; embeddings, and what `keep` or
    `layers` sets apart, count in no budget. method: the quantization step that rounds to the chosen encodings, its
    other fields at their defaults. A choice is expected to cost ½ Σ F E² nats per token, and costs add up over
    linears: E is the error of rounding to nearest, F the squared gradients of the model's own output on the first
    `sensitivity_tokens` of the calibration data. The cheapest table is found exactly. group_size, symmetric, layers,
    keep, embeddings: as in every weight quantization.
    """

    name: ClassVar[str] = "quantize.mixed"
    packs: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = True

    target_bits: float = Field(4.5, gt=0, allow_inf_nan=False)
    # Not strict: a list fills a tuple, in Python as in YAML.
    choices: tuple[CodedName, ...] = Field(("int3", "int4", "int8"), min_length=2, strict=False)
    method: Literal["gptq", "rtn", "awq", "hqq"] = "gptq"
    group_size: int | Literal["channel"] = 32
    symmetric: bool = True
    layers: tuple[str, ...] = Field(("*",), strict=False)
    keep: dict[str, EncodingName] = Field(default_factory=dict)
    embeddings: EncodingName | None = "int8"
    sensitivity_tokens: int = Field(4096, ge=2)

    @field_validator("choices", "keep", "embeddings", mode="before")
    @classmethod
    def _stores(cls, asked: object, info: ValidationInfo) -> object:
        return judged(cls.name, info, asked)

    @model_validator(mode="after")
    def _judge_by_method(self) -> Self:
        """Refuse what the method would."""
        for name in (*self.choices, *self.keep.values(), self.embeddings or "fp32"):
            if reason := methods.refusal(f"quantize.{self.method}", name, kept=name not in self.choices):
                raise RecipeError(f"method: {reason}")
        return self

    def reads(self) -> str:
        """The method with its version: when its results change, so do these."""
        method = self._quantization({})
        return f"{method.name} {method.version}"

    def check(self, facts: Facts) -> None:
        """Refuse group sizes that do not divide, and a budget that allows nothing or leaves nothing to choose."""
        if len(set(self.choices)) < len(self.choices):
            raise RecipeError(f"choices: {', '.join(self.choices)} names an encoding twice")
        for choice in self.choices:
            self._quantization({"*": choice}).check(facts)
        if not self._free(facts):
            raise RecipeError("keep and layers leave no linear to choose for; leave it some, or use another step")
        ends = {choice: _bits(facts, self._all(facts, choice)) for choice in self.choices}
        small, large = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
        if ends[small] == ends[large]:
            alike = f"{', '.join(self.choices)} take {ends[small]:.3f} bits per weight alike"
            raise RecipeError(f"choices: {alike}, which leaves nothing to choose by; give some of other sizes")
        if not ends[small] <= self.target_bits < ends[large]:
            raise RecipeError(
                f"target_bits={self.target_bits}: all linears take {ends[small]:.3f} bits per weight in {small} and "
                f"{ends[large]:.3f} in {large}; give a target between them, or other choices"
            )

    def encodings(self, facts: Facts) -> Mapping[str, Encoding]:
        """A table within the budget, as if all weights mattered alike: its size is that of the real one, nearly."""
        codes = [self._all(facts, choice) for choice in self.choices]
        losses = {
            name: [n * m * 4.0 ** -encodings[name].bits for encodings in codes]
            for name, (n, m) in self._free(facts).items()
        }
        return self._quantization(self.table(facts, losses)).encodings(facts)

    def possible(self, facts: Facts) -> Mapping[str, Sequence[Encoding]]:
        """Every choice, for every linear."""
        found = {name: [encoding] for name, encoding in self._quantization({}).encodings(facts).items()}
        codes = [self._all(facts, choice) for choice in self.choices]
        return {**found, **{f"{name}.weight": [encodings[name] for encodings in codes] for name in self._free(facts)}}

    def gradient_bytes(self, facts: Facts) -> int:
        """Squares of those of every linear that is chosen for."""
        return 4 * sum(n * m for n, m in self._free(facts).values())

    def hessians(self, facts: Facts) -> Mapping[str, int]:
        """The method's."""
        return self._quantization({}).hessians(facts)

    def state_bytes(self, facts: Facts, tokens: float) -> float:
        """The method's: sensitivities are taken window by window."""
        return self._quantization({}).state_bytes(facts, tokens)

    def apply(self, model: Model, context: Context) -> None:
        """Score, solve, and let the method quantize as the table says."""
        self.check(model.facts)
        refuse_encoded(model, self.encodings(model.facts))
        losses = self.losses(model, context)
        table = self.table(model.facts, losses)
        self._quantization(table).apply(model, context)
        expected = sum(losses[name][self.choices.index(choice)] for name, choice in table.items())
        counts = Counter(table.values())
        shares = ", ".join(f"{counts[c]} linears in {c}" for c in self.choices)
        stored = _bits(model.facts, {name: model.encoded[f"{name}.weight"].encoding for name in table})
        context.notes.append(
            f"{self.name}: {shares}; {stored:.3f} of {self.target_bits} bits per weight over the linears; rounded to "
            f"nearest, they are expected to cost {expected:.4f} nats of KL per token"
        )

    def losses(self, model: Model, context: Context) -> dict[str, list[float]]:
        """Expected KL in nats per token of rounding a linear alone, one entry per choice."""
        from compress.numerics.sensitivity import expected_divergence

        fisher, tokens = self._fisher(model, context)
        codes = [self._all(model.facts, choice) for choice in self.choices]
        found: dict[str, list[float]] = {}
        for i, name in enumerate(fisher):
            context.progress(f"rounding {name}", i / len(fisher))
            W = model.parameter(f"{name}.weight").detach()
            found[name] = []
            for encodings in codes:
                rounded = round_to_nearest(name, W, encodings[name], search=True).decode()
                found[name].append(expected_divergence(fisher[name], rounded - W, tokens))
        return found

    def table(self, facts: Facts, losses: Mapping[str, Sequence[float]]) -> dict[str, CodedName]:
        """The choice per linear that solves the knapsack."""
        from compress.numerics.knapsack import choose

        codes, free = [self._all(facts, choice) for choice in self.choices], self._free(facts)
        costs = [
            [round(n * m * encodings[name].bits_per_weight(m)) for encodings in codes] for name, (n, m) in free.items()
        ]
        weights = sum(n * m for n, m in free.values())
        picks = choose(costs, [losses[name] for name in free], int(self.target_bits * weights))
        return {name: self.choices[k] for name, k in zip(free, picks, strict=True)}

    def _fisher(self, model: Model, context: Context) -> tuple[dict[str, Tensor], int]:
        """Squared gradients summed over the tokens, (n, m) per linear chosen for, and the number of tokens."""
        import torch

        from compress.numerics.affine import finite
        from compress.numerics.sensitivity import backward_of_sampled_tokens
        from compress.steps.distill._network import Network
        from compress.steps.distill._training import first

        windows = first(context.calibration, self.sensitivity_tokens)
        if not windows:
            raise RecipeError(f"{self.name} needs data.calibration")
        generator = torch.Generator().manual_seed(context.seed)
        with squares_of(model, self._free(model.facts)) as fisher:
            network = Network(model.module, learns=False)
            for i, window in enumerate(windows):
                context.progress(f"sensitivity, window {i + 1}/{len(windows)}", i / len(windows))
                try:
                    backward_of_sampled_tokens(network.hidden(window), network.head, generator)
                except NumericalError as error:
                    odd = (name for name, weight in model.module.named_parameters() if not finite(weight.detach()))
                    raise NumericalError(f"{next(odd, self.name)}: {error}") from None
        return fisher, sum(map(len, windows))

    def _quantization(self, table: Mapping[str, CodedName]) -> Step:
        """The step that stores what the table says; the first choice where it says nothing."""
        fields = self.model_dump(include={"group_size", "symmetric", "layers", "embeddings"})
        fields |= {"encoding": self.choices[0], "keep": {**table, **self.keep}}
        return step(f"quantize.{self.method}").model_validate(fields)

    def _free(self, facts: Facts) -> dict[str, tuple[int, int]]:
        """The linears that are chosen for, with their shapes: those that `layers` takes and `keep` does not name."""
        kept = {name for pattern in self.keep for name in matched(facts, pattern)}
        taken = selected(facts, self.layers, {}, facts.linears)
        return {name: shape for name, shape in taken.items() if name not in kept}

    def _all(self, facts: Facts, choice: CodedName) -> dict[str, Encoding]:
        """The encoding of each linear that is chosen for if all of them had the same choice."""
        stored = self._quantization({"*": choice}).encodings(facts)
        return {name: stored[f"{name}.weight"] for name in self._free(facts)}


def _bits(facts: Facts, encodings: Mapping[str, Encoding]) -> float:
    """Bits per weight over these linears."""
    sizes = {name: facts.linears[name] for name in encodings}
    bits = sum(n * m * encodings[name].bits_per_weight(m) for name, (n, m) in sizes.items())
    return bits / sum(n * m for n, m in sizes.values())


@contextmanager
def squares_of(model: Model, linears: Mapping[str, tuple[int, int]] | None = None) -> Iterator[dict[str, Tensor]]:
    """Squared gradients per linear, (n, m) float32, summed over every backward pass while this is open.

    linears: name → (n, m); None for all of the blocks.

    No weight gets a gradient of its own: what is squared are the outer products of inputs and output gradients.
    """
    import torch

    from compress.numerics.sensitivity import squared_gradients

    flags = {parameter: parameter.requires_grad for parameter in model.module.parameters()}
    found = {name: torch.zeros(shape) for name, shape in (linears or model.facts.linears).items()}

    def watch(name: str) -> Any:
        def after(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                found[name].add_(squared_gradients(x, gradient.flatten(0, -2)))

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return after

    embedding = model.module.get_input_embeddings()
    hooks = [embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())]
    try:
        model.module.requires_grad_(False)
        hooks += [model.module.get_submodule(name).register_forward_hook(watch(name)) for name in found]
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
