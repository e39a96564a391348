"""Reading an exported ONNX folder back: every tensor in the model's own layout.

A tensor `T` is stored as initializer `T` (floats, in the model's own layout) or as `T.codes`, `T.scales` and,
asymmetric only, `T.zero_points`; the graph's metadata names its encoding and the flavour of the graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt, RecipeError, UnsafeInput
from compress.rounding import InputRounding
from export._onnx_packing import WIDTHS, Packed, unpacked

if TYPE_CHECKING:
    from torch import Tensor

GRAPH = "model.onnx"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"  # of a model that reads one text and writes another
DATA = "model.onnx.data"
METADATA = "compress.encodings"
FLAVOUR = "compress.flavour"
INPUTS = "compress.inputs"
MICROSOFT = "com.microsoft"  # domain of onnxruntime's own operators


def record(
    model: Any,
    tensors: Mapping[str, EncodedTensor | Tensor],
    flavour: str,
    inputs: Mapping[str, InputRounding] | None = None,
) -> None:
    """Write flavour, the encoding of each tensor in the model's order, and the rounding of inputs into the metadata."""
    kinds = {name: asdict(t.encoding) if isinstance(t, EncodedTensor) else None for name, t in tensors.items()}
    model.metadata_props[METADATA] = json.dumps(kinds, separators=(",", ":"))
    model.metadata_props[FLAVOUR] = flavour
    if inputs:
        schemes = {name: rounding.scheme for name, rounding in inputs.items()}
        model.metadata_props[INPUTS] = json.dumps(schemes, separators=(",", ":"))


def load(folder: Path, file: str = GRAPH) -> Any:
    """A graph of an exported folder, data left on disk.

    Raises Corrupt for what cannot be parsed or ends early, UnsafeInput for data outside the folder's file.
    """
    import onnx_ir as ir

    for name in (file, DATA):
        if (folder / name).is_symlink():
            raise UnsafeInput(f"{folder / name} is a symbolic link")
        if not (folder / name).is_file():
            raise Corrupt(f"{folder}: {name} is missing")
    try:
        model = ir.load(folder / file)
    except Exception as error:  # protobuf, onnx-ir and numpy each raise their own
        raise Corrupt(f"{folder / file} is no ONNX model: {error}") from error
    size = (folder / DATA).stat().st_size
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if str(tensor.location) != DATA:
            raise UnsafeInput(f"{folder / file}: {name} lies in {tensor.location!s}, not in {DATA}")
        if (tensor.offset or 0) < 0 or (tensor.offset or 0) + (tensor.length or 0) > size:
            raise Corrupt(f"{folder / DATA}: {name} ends beyond the file")
    return model


def graphs(folder: Path) -> list[Any]:
    """All graphs of an exported folder: one, or an encoder and a decoder; see `load`."""
    halves = (folder / ENCODER).is_file() or (folder / DECODER).is_file()
    return [load(folder, file) for file in ((ENCODER, DECODER) if halves else (GRAPH,))]


def save_together(models: Mapping[str, Any], folder: Path) -> None:
    """Write graphs by file name, with one file of data: what initializers of one name hold is stored once."""
    import onnx_ir as ir

    values: dict[str, list[Any]] = {}
    for model in models.values():
        for name, value in model.graph.initializers.items():
            values.setdefault(name, []).append(value)
    held = [alike[0].const_value for alike in values.values()]
    for alike, external in zip(values.values(), ir.external_data.convert_tensors_to_external(held, folder, DATA)):
        for value in alike:
            value.const_value = external
    for file, model in models.items():
        ir.save(model, folder / file)


def encodings(model: Any) -> dict[str, Encoding | None]:
    """Encoding of every tensor (None: float32), in the model's order, from the graph's metadata."""
    try:
        kinds = json.loads(model.metadata_props[METADATA])
        return {name: None if kind is None else Encoding(**kind) for name, kind in kinds.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise Corrupt(f"the ONNX metadata {METADATA!r} is missing or damaged: {error}") from error


def inputs(model: Any) -> dict[str, InputRounding]:
    """How the graph rounds the inputs of linears; raises Corrupt where its nodes do not do what its metadata say."""
    try:
        schemes: dict[str, Any] = json.loads(model.metadata_props.get(INPUTS, "{}"))
    except ValueError as error:
        raise Corrupt(f"the ONNX metadata {INPUTS!r} is damaged: {error}") from error
    found = {name: _rounding(model.graph, name) for name in schemes}
    if wrong := [name for name, scheme in schemes.items() if found[name].scheme != scheme]:
        raise Corrupt(f"{wrong[0]}: the graph rounds its inputs otherwise than {schemes[wrong[0]]!r}")
    return found


def _rounding(graph: Any, linear: str) -> InputRounding:
    """The rounding in front of the integer product that reads a linear's codes; raises Corrupt."""
    try:
        node = next(n for n in graph if n.outputs[0].name == f"{linear}.weight.integers")
        source = node.inputs[0].producer()
        if source.op_type != "QuantizeLinear":
            return InputRounding("dynamic")
        return InputRounding("static", float(source.inputs[1].producer().attributes["value"].as_tensor().numpy()))
    except (StopIteration, AttributeError, KeyError) as error:
        raise Corrupt(f"the ONNX graph has no product of integers for {linear} ({error!r})") from error


def stored(model: Any) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
    """Every tensor of a loaded graph in the model's own layout."""
    read = dequantized_tensor if model.metadata_props.get(FLAVOUR) == "portable" else affine_tensor
    for name, encoding in encodings(model).items():
        if encoding is not None and encoding.is_affine:
            yield name, read(model.graph, name, encoding)
        elif encoding is not None:
            yield name, EncodedTensor(encoding, held_tensor(model.graph, name))
        else:
            yield name, held_tensor(model.graph, name)


def stored_together(models: Sequence[Any]) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
    """Every tensor of several graphs once; raises Corrupt where two of them read one name from different places."""
    places: dict[str, Any] = {}
    seen: set[str] = set()
    for model in models:
        for name, value in model.graph.initializers.items():
            place = getattr(value.const_value, "offset", None), getattr(value.const_value, "length", None)
            if places.setdefault(name, place) != place:
                raise Corrupt(f"{name}: two graphs read it from different places of {DATA}")
        for name, tensor in stored(model):
            if name not in seen:
                yield name, tensor
            seen.add(name)


def affine_tensor(graph: Any, name: str, encoding: Encoding) -> EncodedTensor:
    """The codes, scales and zero points of one tensor; Corrupt where a node would read them otherwise."""
    codes, scales = held_tensor(graph, f"{name}.codes"), held_tensor(graph, f"{name}.scales")
    zeros = held_tensor(graph, f"{name}.zero_points") if f"{name}.zero_points" in graph.initializers else None
    bits = WIDTHS[encoding.bits]
    if codes.ndim != 3 or codes.shape[:2] != scales.shape:
        raise Corrupt(f"{name}: codes {tuple(codes.shape)} do not fit scales {tuple(scales.shape)}")
    block = codes.shape[2] * 8 // bits
    for node in _readers(graph, f"{name}.codes"):
        form = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int(), len(node.inputs) == 4
        if form != (bits, block, zeros is not None):
            raise Corrupt(f"{name}: {node.name} does not read {encoding} in blocks of {block}")
    return unpacked(name, Packed(bits, block, codes, scales, zeros), encoding)


def dequantized_tensor(graph: Any, name: str, encoding: Encoding) -> EncodedTensor:
    """One tensor as DequantizeLinear reads it; Corrupt where a node would read it otherwise."""
    import torch

    codes, scales = held_tensor(graph, f"{name}.codes"), held_tensor(graph, f"{name}.scales")
    zeros = held_tensor(graph, f"{name}.zero_points") if f"{name}.zero_points" in graph.initializers else None
    if codes.ndim != 2 or scales.ndim != 2 or len(codes) != len(scales) or codes.shape[1] % scales.shape[1]:
        raise Corrupt(f"{name}: codes {tuple(codes.shape)} do not fit scales {tuple(scales.shape)}")
    block = codes.shape[1] // scales.shape[1]
    for node in graph.initializers[f"{name}.codes"].consumers():
        names = [f"{name}.codes", f"{name}.scales.float32", *([] if zeros is None else [f"{name}.zero_points"])]
        form = node.op_type, node.domain, [value.name for value in node.inputs]
        where = node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()
        cast = node.inputs[1].producer()
        if form != ("DequantizeLinear", "", names) or where != (1, block) or cast.inputs[0].name != f"{name}.scales":
            raise Corrupt(f"{name}: {node.name} does not read {encoding} in blocks of {block}")
    low, high = encoding.code_range
    kind = torch.int8 if encoding.symmetric else torch.uint8
    if (zeros is None) != encoding.symmetric or codes.dtype != kind or codes.min() < low or codes.max() > high:
        raise Corrupt(f"{name}: stored codes or zero points do not fit {encoding}")
    return EncodedTensor(encoding, codes, scales, zeros)


def _readers(graph: Any, initializer: str) -> Iterator[Any]:
    """The quantized operators that compute with an initializer, seen through reshapes and joins."""
    for node in graph.initializers[initializer].consumers():
        for reader in node.outputs[0].consumers() if node.op_type in ("Reshape", "Concat") else (node,):
            if reader.domain == MICROSOFT:
                yield reader


def held_tensor(graph: Any, initializer: str) -> Tensor:
    """An initializer as a torch tensor of its stored dtype; raises Corrupt where it is missing."""
    import torch

    if initializer not in graph.initializers:
        raise Corrupt(f"the ONNX graph has no initializer {initializer!r}")
    array = graph.initializers[initializer].const_value.numpy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    if array.dtype.name in ("int4", "uint4"):  # a byte each, once read
        return torch.from_numpy(array.astype(array.dtype.name.replace("4", "8")))
    return torch.from_numpy(array.copy())


def norm_output(model: Any, module: str) -> str:
    """Name of the value that a norm computes, in an onnx.ModelProto; raises Corrupt where there is none."""
    gains = {f"{module}.weight", f"{module}.weight.float32", f"{module}.weight.gain"}
    for node in model.graph.node:
        if node.op_type != "Cast" and node.output[0] not in gains and gains & set(node.input):
            found: str = node.output[0]
            return found
    raise Corrupt(f"the ONNX graph has no norm {module!r}")
