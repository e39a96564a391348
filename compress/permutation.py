"""Permuting a decoder's channels without changing its function.

A model whose weights were block-quantized once looks lossless when it is quantized again on the same grid:
every block already holds 2^b values. Permuting the residual, MLP and value channels keeps the function and
moves every weight to another block, so that what is measured afterwards is the loss of an ordinary model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.architectures import Facts


@torch.no_grad()
def permute_channels(module: nn.Module, facts: Facts, seed: int = 0) -> None:
    """Permute residual, MLP and value channels of `module` in place, drawn from `seed`.

    RMS norms, residual sums and elementwise activations commute with a permutation of their channels; query
    and key channels do not (rotary embedding pairs them) and stay. Value channels are permuted within each
    key/value head, and the output projection's inputs accordingly for every query head of the group.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randperm(facts.sizes["residual"], generator=generator)
    arch = facts.architecture
    parameters = dict(module.named_parameters(remove_duplicate=False))

    def permute(name: str, index: Tensor, dim: int) -> None:
        if name in parameters:  # biases are optional
            parameters[name].copy_(parameters[name].index_select(dim, index))

    permute(f"{arch.embedding}.weight", residual, 1)
    permute(f"{arch.final_norm}.weight", residual, 0)
    if not facts.tied:
        permute(f"{arch.head}.weight", residual, 1)
    for i in range(facts.layers):
        block = f"{arch.blocks}.{i}"
        mlp = torch.randperm(facts.sizes["mlp"], generator=generator)
        value, output = _value_permutation(facts, generator)
        rows = {"residual": residual, "mlp": mlp}
        columns = {"residual": residual, "mlp": mlp, "q": output}  # only o_proj reads "q" channels
        for norm in arch.norms:
            permute(f"{block}.{norm}.weight", residual, 0)
        for name, (out_axis, in_axis) in arch.linears.items():
            permute(f"{block}.{name}.weight", columns[in_axis], 1)
            row_index = value if name.endswith("v_proj") else rows.get(out_axis)
            if row_index is not None:
                permute(f"{block}.{name}.weight", row_index, 0)
                permute(f"{block}.{name}.bias", row_index, 0)


def _value_permutation(facts: Facts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row order of v_proj (kv,) and the matching column order of o_proj (q,)."""
    size = facts.head_size
    per_head = [torch.randperm(size, generator=generator) for _ in range(facts.kv_heads)]
    value = torch.cat([h * size + order for h, order in enumerate(per_head)])
    queries_per_group = facts.heads // facts.kv_heads
    output = torch.cat([h * size + per_head[h // queries_per_group] for h in range(facts.heads)])
    return value, output
