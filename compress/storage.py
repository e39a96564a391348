"""Tensors in whatever encoding as entries of a safetensors file, and back.

A float tensor stands under its own name; a coded one as <module>.codes, .scales and .zero_points, its codes packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, NonFiniteModel
from compress.numerics.affine import finite
from compress.numerics.packing import pack, unpack

if TYPE_CHECKING:
    from compress.streaming import Shelf

PARTS = (".codes", ".scales", ".zero_points", ".mask")
# Buffers of embeddings that are no weights: by their name, and as long as there are positions.
_CONSTANTS = {
    "position_ids": lambda n: torch.arange(n).expand(1, -1),
    "token_type_ids": lambda n: torch.zeros(1, n, dtype=torch.long),
}


def require_finite(where: object, name: str, tensor: Tensor) -> None:
    """Raise NonFiniteModel naming a tensor, and where it was read from, if it holds NaN or infinity."""
    if not finite(tensor):
        odd = int((~torch.isfinite(tensor)).sum())
        remedy = "get the model anew, or convert it anew to a type that holds its numbers (float16 ends at 65504)"
        raise NonFiniteModel(f"{where}: {odd} of the {tensor.numel()} numbers of {name} are not finite; {remedy}")


def flatten(tensors: Iterable[tuple[str, EncodedTensor | Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The entries of a file, and what `read_encoded` must know of each encoded tensor, by its name."""
    entries: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    for name, tensor in tensors:
        if isinstance(tensor, Tensor):
            entries[name] = tensor.contiguous()
            continue
        module, encoding = name.removesuffix(".weight"), tensor.encoding
        specs[name] = {
            "name": encoding.name,
            "group_size": encoding.group_size,
            "symmetric": encoding.symmetric,
            "shape": list(tensor.codes.shape),
        }
        entries[f"{module}.codes"] = pack(tensor.codes, encoding.bits) if encoding.is_coded else tensor.codes
        if tensor.scales is not None:
            entries[f"{module}.scales"] = tensor.scales.contiguous()
        if tensor.zero_points is not None:
            entries[f"{module}.zero_points"] = tensor.zero_points.contiguous()
    return entries, specs


def read_encoded(name: str, spec: Mapping[str, Any], entries: Mapping[str, Tensor]) -> EncodedTensor:
    """The inverse of `flatten` for one encoded tensor."""
    encoding = Encoding(spec["name"], spec["group_size"], spec["symmetric"])
    module = name.removesuffix(".weight")
    codes = entries[f"{module}.codes"]
    if encoding.is_coded:
        codes = unpack(codes, encoding.bits, tuple(spec["shape"]), signed=encoding.signed)
    return EncodedTensor(encoding, codes, entries.get(f"{module}.scales"), entries.get(f"{module}.zero_points"))


def unflatten(
    entries: Mapping[str, Tensor], specs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, EncodedTensor]]:
    """The inverse of `flatten`: tensors stored as they are, and encoded ones; masks are left out."""
    encoded = {name: read_encoded(name, spec, entries) for name, spec in specs.items()}
    return {name: tensor for name, tensor in entries.items() if not name.endswith(PARTS)}, encoded


def materialize(module: Any, state: Mapping[str, Tensor], shelf: Shelf | None = None) -> None:
    """Fill a meta-device module with `state`; buffers that are no weights (rotary tables) are computed anew.

    shelf: what it holds stays bare. Raises Corrupt for a tensor that is missing.
    """
    module.load_state_dict(state, strict=False, assign=True)
    module.tie_weights()
    left = [n for n, p in module.named_parameters() if p.is_meta and (shelf is None or not shelf.holds(n))]
    if left:
        raise Corrupt(f"tensor {left[0]} is missing from model.safetensors")
    for name, child in module.named_modules():
        for buffer, held in child.named_buffers(recurse=False):
            if held.is_meta and buffer in _CONSTANTS:
                setattr(child, buffer, _CONSTANTS[buffer](held.shape[-1]))
        if any(b.is_meta for b in child.buffers(recurse=False)):
            if hasattr(child, "scalar_embed_scale"):  # Gemma's, of the embedding
                child.embed_scale = torch.tensor(child.scalar_embed_scale)
                continue
            if not hasattr(child, "rope_type"):
                raise Corrupt(f"module {name} has a buffer that its config does not determine")
            with torch.device("cpu"):
                fresh = type(child)(module.config)
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], fresh)
