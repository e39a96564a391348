"""Walking a model block by block over calibration data, each block fed by the already changed ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.batching import alike, first_holding
from compress.errors import NumericalError, RecipeError
from compress.families import Stack
from compress.machine import return_freed_memory
from compress.model import Model
from compress.numerics.affine import finite
from compress.numerics.products import working_products, working_type
from compress.pairs import split
from compress.reuse import Products, Reuse, replaced
from compress.seq2seq import Seq2Seq

Observer = Callable[[tuple[str, ...], Tensor], None]
"""Called with the linears that share an input, and that input: (tokens, in_features) float32."""
Feeds = list[dict[str, Tensor]]
Half = Generator["Block", None, tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Arguments:
    """What a block is called with besides its hidden states: positions, masks and rotary tables."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def call(self, module: nn.Module, states: Tensor) -> Tensor:
        """The hidden states (batch, length, width) float32 that leave a block."""
        out = module(states, *self.positional, **self.named)
        left: Tensor = (out[0] if isinstance(out, tuple) else out).float()
        return left


class Block:
    """One block and the hidden states that enter it.

    linears: full module name → linear. index: position in its stack. arguments: those of all batches, or of each.
    originals: where `walk` was asked for them, first linear of a stage → the inputs that it has in the model as it was,
    one (tokens, in_features) tensor of the working type per batch, of as many first batches as are carried; none of a
    stage that reads the MLP's inner channels, nor of one whose turn in `stages_in_turn` is over. reuse: memory that
    blocks hand on.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        model: Model,
        states: list[Tensor],
        arguments: Arguments | Sequence[Arguments],
        stack: Stack | None = None,
        reuse: Reuse | None = None,
    ):
        arch = model.facts.architecture
        self.index, self.module = index, module
        self._stack = stack or model.facts.stacks[-1]
        self._prefix = f"{self._stack.blocks}.{index}"
        self._architecture = arch
        self._states = states
        self._arguments = [arguments] * len(states) if isinstance(arguments, Arguments) else arguments
        self._batch = 0  # the one that is running
        self._left: list[Tensor] | None = None  # the hidden states that leave, once they are known
        self._reuse = reuse or Reuse()
        self.originals: dict[str, list[Tensor]] = {}
        self.linears: dict[str, nn.Linear] = {}
        for name in self._stack.linears:
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.linears[f"{self._prefix}.{name}"] = linear
        self.inner = {f"{self._prefix}.{n}" for n, (_, read) in self._stack.linears.items() if read == "mlp"}

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """Full names of the linears, grouped by shared input, in the order of computation."""
        return [tuple(f"{self._prefix}.{name}" for name in stage) for stage in self._stack.stages]

    @torch.inference_mode()
    def observe(self, callback: Observer) -> list[Tensor]:
        """Run the block over all hidden states and report the input of each group of linears; the states that leave."""
        return self._watch(lambda names, X: callback(names, X.float()))

    def _watch(self, callback: Observer, last: bool = False) -> list[Tensor]:
        """`observe`, with inputs as they are. last: the states that leave take the place of those that enter."""
        hooks = []
        for names in self.stages:

            def report(_: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...] = names) -> None:
                callback(names, inputs[0].flatten(0, -2))

            hooks.append(self.linears[names[0]].register_forward_pre_hook(report))
        left = []
        try:
            for batch in range(len(self._states)):
                left.append(self._leaving(batch, last))
        finally:
            for hook in hooks:
                hook.remove()
        return left

    def stages_in_turn(self, last: bool = False) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
        """Each group of linears with its inputs, fed by the linears before it as the caller has changed them.

        Yields (names, inputs), the inputs being one (tokens, in_features) tensor of the working type per batch: what
        the products see, until the next group has its turn, which may take their place. The block is computed only once
        in all: a submodule that ends in a linear whose turn has come (attention, MLP) runs no more, its last product
        aside, nor does a norm whose output is known, which the caller must leave as it is; `advance` is part of that.
        last: nothing but `advance` follows, so that the states that leave take the place of those that enter.
        """
        architecture = self._architecture
        read = {norm: readers for norm, readers in architecture.folds if norm in architecture.block_norms}
        norms = {readers[0]: norm for norm, readers in read.items()}
        settled: list[nn.Module] = []
        answers: dict[str, list[Tensor]] = {}  # submodule → what it answers with
        try:
            for names in self.stages:
                inputs = [self._input_of(names[0], i) for i in range(len(self._states))]
                flat, originals = [X.flatten(0, -2) for X in inputs], self.originals.get(names[0], [])
                yield names, flat
                flat.clear()  # which the caller may still hold
                self._reuse.give(originals)
                self.originals.pop(names[0], None)
                own = names[0].removeprefix(f"{self._prefix}.")
                parent = own.rpartition(".")[0]
                if own in norms:
                    answers[norms[own]] = inputs
                    settled.append(self.module.get_submodule(norms[own]))
                    self._answer(settled[-1], inputs)
                elif own in architecture.closing:
                    answers[parent] = inputs
                    settled.append(self.module.get_submodule(parent))
                    products = Products(self.linears[names[0]], inputs)
                    self._answer(settled[-1], products, pair=parent == architecture.attention)
                    for norm, readers in read.items():
                        if all(name.startswith(f"{parent}.") for name in readers):  # none of which runs any more
                            settled.append(self.module.get_submodule(norm))
                            settled[-1].forward = _unchanged
                            self._reuse.give(answers.pop(norm, []))
                else:
                    self._reuse.give(inputs)
            self._left = [self._leaving(batch, last) for batch in range(len(self._states))]
            for held in answers.values():
                self._reuse.give(held)
        finally:
            for module in set(settled):
                del module.forward  # the class's own again

    def _answer(self, module: nn.Module, known: Sequence[Tensor], pair: bool = False) -> None:
        """Let a submodule answer with what is known of each batch. pair: attention gives weights, too."""

        def forward(*_: Any, **__: Any) -> Any:
            out = known[self._batch]
            return (out, None) if pair else out

        module.forward = forward

    @torch.inference_mode()
    def _input_of(self, name: str, batch: int) -> Tensor:
        """The input of a linear on one batch, (windows, length, in_features) of the working type; no more is run."""
        caught: list[Tensor] = []

        def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught.append(self._reuse.take(inputs[0], working_type()))
            raise _Captured

        hook = self.linears[name].register_forward_pre_hook(capture)
        try:
            self._run(batch)
        except _Captured:
            return caught[0]
        finally:
            hook.remove()
        raise AssertionError(f"{name} is not part of the block's computation")

    @torch.inference_mode()
    def around(self, name: str, last: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A linear that ends a submodule: per batch its inputs, and the residual stream before and after it.

        Yields (tokens, in_features), (tokens, width), (tokens, width), float32: before a norm, if one reads the sum of
        both. last: the block will not be changed before `advance`, which then answers from what was computed here.
        """
        own, arch = name.removeprefix(f"{self._prefix}."), self._architecture
        assert own in arch.closing or own in arch.sum_norms
        # The stream before attention is known, and a norm is given its sum: nothing more need run.
        early = not last if own in arch.sum_norms else own.startswith(f"{arch.attention}.")
        left = []
        for batch in range(len(self._states)):
            (X, product, *sums), out = self._caught_around(name, batch, early, arch.sum_norms.get(own))
            after = sums[0] if sums else out
            if own in arch.post_norms:
                norm = self.module.get_submodule(arch.post_norms[own])
                product = norm(product.to(working_type())).float()  # as the block rounds it, before and after
            before = self._states[batch] if after is None else after - product
            yield X, before.flatten(0, -2), (before + product if after is None else after).flatten(0, -2)
            left += [] if out is None else [out]
        self._left = left if last and not early else None

    def _caught_around(
        self, name: str, batch: int, early: bool, norm: str | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Of a linear on one batch, inputs and product, and what the norm reads, if any; what leaves, unless early."""
        caught: list[Tensor] = []

        def keep(*found: Tensor, stop: bool) -> None:
            caught.extend(part.float() for part in found)
            if stop:
                raise _Captured

        hooks = [
            self.linears[name].register_forward_hook(
                lambda _, inputs, product: keep(inputs[0].flatten(0, -2), product, stop=early and norm is None)
            )
        ]
        if norm is not None:
            reads = self.module.get_submodule(norm)
            hooks.append(reads.register_forward_pre_hook(lambda _, inputs: keep(inputs[0], stop=early)))
        out = None
        try:
            out = self._run(batch)
        except _Captured:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return caught, out

    @torch.inference_mode()
    def advance(self) -> list[Tensor]:
        """The hidden states that leave the block, with its weights as they are now, until the next has its turn."""
        if self._left is not None:
            return self._left
        return [self._run(i) for i in range(len(self._states))]

    def _leaving(self, batch: int, last: bool) -> Tensor:
        """The hidden states that leave on one batch; last: in the place of those that enter."""
        out = self._run(batch)
        if last:
            out = self._states[batch] = replaced(self._states[batch], out)
        return out

    @torch.inference_mode()
    def _run(self, batch: int) -> Tensor:
        self._batch = batch
        with working_products():
            states_out = self._arguments[batch].call(self.module, self._states[batch])
        if not finite(states_out):
            raise NumericalError(f"{self._prefix}: non-finite hidden states on the calibration data")
        return states_out


def walk(
    model: Model,
    windows: Sequence[Tensor],
    progress: Callable[[str, float], None] = lambda label, fraction: None,
    windows_per_batch: int = 8,
    originals: int = 0,
) -> Iterator[Block]:
    """Yield the model's blocks in order; a block changed by the caller feeds the next one.

    windows: (length,) int64 each, all of one length. Of an encoder-decoder they are pairs of any length, and blocks of
    the encoder come before those of the decoder, which read what it makes of the sources by then. originals: also
    carry the states that the unchanged model has on the first batches, those that hold so many tokens or all, which
    costs a second pass over them. Raises RecipeError without calibration data.
    """
    if not windows:
        raise RecipeError("this step needs calibration data; the calibration set holds no window")
    if isinstance(model, Seq2Seq):
        yield from _walk_halves(model, windows, progress, windows_per_batch, originals)
        return
    lengths = {len(w) for w in windows}
    if len(lengths) != 1:
        raise RecipeError(f"calibration windows differ in length: {sorted(lengths)[:3]}")
    blocks = model.module.get_submodule(model.facts.architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    stacked = torch.stack(list(windows))
    states, arguments = enter(model, list(torch.split(stacked, windows_per_batch)))
    if model.shelf is not None:
        model.shelf.set_aside()
    untouched = [X.clone() for X in states[: first_holding(originals, (X.shape[:2].numel() for X in states))]]
    reuse = Reuse()
    for index, module in enumerate(blocks):
        progress(f"block {index + 1}/{len(blocks)}", index / len(blocks))
        block = Block(index, module, model, states, arguments[index], reuse=reuse)
        if untouched:
            untouched = _observe_originals(block, Block(index, module, model, untouched, arguments[index]))
        yield block
        if index + 1 < len(blocks):
            states = block.advance()
    reuse.clear()
    if model.shelf is not None:
        return_freed_memory()  # as much as lies free between what stays
    progress("blocks", 1.0)


def _walk_halves(
    model: Seq2Seq,
    windows: Sequence[Tensor],
    progress: Callable[[str, float], None],
    windows_per_batch: int,
    originals: int,
) -> Iterator[Block]:
    """`walk` over the encoder, then over the decoder."""
    batches = alike([split(window.tolist(), model.start) for window in windows], windows_per_batch)
    reading, writing = model.facts.stacks
    total = reading.layers + writing.layers

    def along(stack: Stack, before: int, feeds: Feeds, untouched: Feeds | None) -> Half:
        def report(index: int) -> None:
            progress(f"block {before + index + 1}/{total}", (before + index) / total)

        return _walk_half(model, stack, feeds, untouched, report)

    sources = [{"input_ids": torch.tensor([source for source, _ in batch])} for batch in batches]
    carried = first_holding(originals, (sum(min(map(len, pair)) for pair in batch) for batch in batches))
    read = yield from along(reading, 0, sources, sources[:carried] or None)
    targets = [torch.tensor([target for _, target in batch]) for batch in batches]
    feeds, untouched = (
        [{"input_ids": ids, "encoder_hidden_states": states} for ids, states in zip(targets, found)] for found in read
    )
    yield from along(writing, reading.layers, feeds, untouched or None)
    progress("blocks", 1.0)


def _walk_half(
    model: Seq2Seq, stack: Stack, feeds: Feeds, untouched: Feeds | None, progress: Callable[[int], None]
) -> Half:
    """Yield the blocks of a half; returns the normed states that leave it, and those of the model as it was, if asked.

    feeds: what the half is called with, per batch; untouched: the same in the model as it was.
    """
    half = model.module.get_submodule(stack.blocks.partition(".")[0])
    states, *arguments = _enter_half(half, feeds)
    before, *others = _enter_half(half, untouched) if untouched else ([], [], [])
    reuse = Reuse()
    for index, module in enumerate(half.block):
        progress(index)
        later = min(index, 1)
        block = Block(index, module, model, states, arguments[later], stack, reuse)
        if untouched:
            before = _observe_originals(block, Block(index, module, model, before, others[later], stack))
        yield block
        states = block.advance()
    reuse.clear()
    with torch.inference_mode():
        return [half.final_layer_norm(state) for state in states], [half.final_layer_norm(state) for state in before]


@torch.inference_mode()
def _enter_half(half: Any, feeds: Feeds) -> tuple[list[Tensor], list[Arguments], list[Arguments]]:
    """Hidden states that enter the first block, per batch; what the first is called with besides, and what all others.

    The first block makes the biases of distances, which the others are given.
    """
    states: list[Tensor] = []
    found: tuple[list[Arguments], list[Arguments]] = [], []

    def capture(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[index].append(Arguments(args[1:], kwargs))
        if index == 0:
            states.append(args[0].float())
        if index == 1 or len(half.block) == 1:
            raise _Captured

    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs, i=i: capture(i, args, kwargs), with_kwargs=True)
        for i, block in enumerate(half.block[:2])
    ]
    try:
        for feed in feeds:
            try:
                half(**feed, use_cache=False)
            except _Captured:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return states, *found


def _observe_originals(block: Block, untouched: Block) -> list[Tensor]:
    """Fill in the block's `originals` from the untouched model's states; the states that leave it there."""

    def keep(names: tuple[str, ...], X: Tensor) -> None:
        if names[0] not in block.inner:
            block.originals.setdefault(names[0], []).append(block._reuse.take(X, working_type()))

    return untouched._watch(keep, last=True)


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the forward pass once what it was run for is known."""


@torch.inference_mode()
def enter(model: Model, batches: list[Tensor]) -> tuple[list[Tensor], list[Arguments]]:
    """Hidden states that enter the first block, per batch, and what each block is called with besides.

    batches: (windows, length) int64 each. Windows are never padded, so that one window's masks serve all.
    """
    blocks = list(model.module.get_submodule(model.facts.architecture.blocks))
    kinds = getattr(model.module.config, "layer_types", None) or [""] * len(blocks)
    firsts = {kind: kinds.index(kind) for kind in kinds}  # blocks of one kind are called alike
    found: dict[int, Arguments] = {}
    states: list[Tensor] = []

    def capture(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {key: _of_one(value) for key, value in kwargs.items() if key != "hidden_states"}
        if index == 0:
            states.append((args[0] if args else kwargs["hidden_states"]).float())
        found[index] = Arguments(tuple(map(_of_one, args[1:])), named)
        if len(states) > 1 or index == max(firsts.values()):
            raise _Captured

    hooks = [
        blocks[i].register_forward_pre_hook(lambda _, args, kwargs, i=i: capture(i, args, kwargs), with_kwargs=True)
        for i in firsts.values()
    ]
    passed = blocks[: max(firsts.values())]
    for block in passed:  # to the first block of each kind, without computing those before it
        block.forward = _unchanged
    try:
        for batch in batches:
            try:
                model.module.base_model(input_ids=batch, use_cache=False)
            except _Captured:
                pass
    finally:
        for hook in hooks:
            hook.remove()
        for block in passed:
            del block.forward  # the class's own again
    return states, [found[firsts[kind]] for kind in kinds]


def _of_one(argument: Any) -> Any:
    """A mask of one window where it is one of several."""
    return argument[:1] if isinstance(argument, Tensor) and argument.dim() == 4 else argument


def _unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
