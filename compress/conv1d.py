"""GPT-2's linears as everyone else's: transformers keeps them as Conv1D, whose weight is (in, out)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.architectures import Facts


def as_linears(module: nn.Module) -> None:
    """Replace every Conv1D inside `module` by an nn.Linear of the same function, in place; others are untouched."""
    for name, child in [(n, m) for n, m in module.named_modules() if isinstance(m, Conv1D)]:
        inputs, outputs = child.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(child.weight.detach().T.contiguous(), child.weight.requires_grad)
        linear.bias = child.bias
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, linear.train(child.training))


def flipped(tensors: Iterable[tuple[str, Tensor]], facts: Facts) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name as transformers stores them, or back: where it keeps linears as (in, out), these change."""
    turned = {f"{name}.weight" for name in facts.linears} if facts.architecture.transposed else set()
    for name, tensor in tensors:
        yield name, tensor.T.contiguous() if name in turned else tensor
