"""Graph surgery: the weights of a float32 onnxruntime-genai graph exchanged for a model's own stored form.

The builder of onnxruntime-genai makes the graph (attention, rotary caches, key-value cache); every weight in
it is then replaced by the model's codes, scales, zero points or floats under the model's own tensor name, so
that nothing the builder rounded or folded can remain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.encodings import EncodedTensor
from compress.errors import CompressError, RecipeError
from compress.rounding import InputRounding
from export._onnx_file import MICROSOFT
from export._onnx_packing import Packed, has_kernel, packed

if TYPE_CHECKING:
    from torch import Tensor

# The builder's names → the model's; what matches nothing is a constant of the graph, no weight.
_NAMES = (
    (r"\.attn\.", ".self_attn."),
    (r"\.layernorm\.weight$", ".weight"),
    (r"\.MatMul\.weight$", ".weight"),
    (r"\.Add\.bias$", ".bias"),
    (r"^model\.layers\.\d+\.final_norm_layernorm\.", "model.norm."),
)
_CONSTANTS = ("cos_cache", "sin_cache")
TINY = 1e-20  # as in `numerics.runtime_rounding`: a token of zeros needs some scale


def tensor_name(initializer: str) -> str | None:
    """The model's name of a builder's initializer, None for a constant of the graph.

    >>> tensor_name("model.layers.3.attn.q_proj.MatMul.weight")
    'model.layers.3.self_attn.q_proj.weight'
    >>> tensor_name("model.layers.30.final_norm_layernorm.weight"), tensor_name("cos_cache")
    ('model.norm.weight', None)
    """
    if initializer in _CONSTANTS:
        return None
    for pattern, replacement in _NAMES:
        initializer = re.sub(pattern, replacement, initializer)
    return initializer


class Surgeon:
    """Replaces the weights of one graph; `replace_all` is the operation."""

    def __init__(
        self,
        graph: Any,
        tensors: Mapping[str, EncodedTensor | Tensor],
        aliases: Mapping[str, str],
        accuracy_level: int,
        inputs: Mapping[str, InputRounding] | None = None,
    ):
        self.graph = graph
        self.tensors = tensors
        self.aliases = aliases  # a tied head → the embedding
        self.accuracy_level = accuracy_level
        self.inputs = inputs or {}  # linear → how what it reads is rounded
        self.old = {name: value for name, value in graph.initializers.items() if tensor_name(name) is not None}
        self.derived: dict[str, Any] = {}  # outputs of nodes that convert an initializer, shared by its users

    def replace_all(self) -> None:
        """Exchange every weight; CompressError if a tensor or a weight of the builder is left over."""
        for name in self.old:
            del self.graph.initializers[name]
        for name, value in self.old.items():
            for node in tuple(value.consumers()):
                self._replace(node, self._source(name))
        for node in tuple(self.graph):
            if node.op_type == "GroupQueryAttention":
                self._join(node)
        self.graph.sort()
        self._assert_complete()

    def _source(self, initializer: str) -> str:
        name = tensor_name(initializer)
        assert name is not None
        name = self.aliases.get(name, name)
        if name not in self.tensors:
            raise CompressError(f"the graph has a weight {initializer!r} that the model does not know as {name!r}")
        return name

    def _assert_complete(self) -> None:
        stored = {name for name in self.graph.initializers if name not in _CONSTANTS}
        expected = {part for name, tensor in self.tensors.items() for part in _parts(name, tensor)}
        used = {value.name for node in self.graph for value in node.inputs if value is not None}
        stale = used & (self.old.keys() - expected)
        if stored != expected or stale or not stored <= used:
            odd = sorted((stored ^ expected) | stale | (stored - used))
            raise CompressError(f"the ONNX graph and the model disagree about {', '.join(odd[:5])}")

    def _replace(self, node: Any, name: str) -> None:
        tensor = self.tensors[name]
        if not isinstance(tensor, EncodedTensor) or not tensor.encoding.is_affine:
            self._use_floats(node, name)
        elif node.op_type == "MatMul":
            self._use_codes(node, name, tensor)
        elif node.op_type == "Gather":
            self._use_gather_block_quantized(node, name, tensor)
        else:
            raise RecipeError(f"{name}: ONNX has no exact form of {tensor.encoding} as input of {node.op_type}")

    def _use_floats(self, node: Any, name: str) -> None:
        if node.op_type == "MatMul":
            self._multiply(node, name, self._float32(name))
        else:
            old = next(v for v in node.inputs if v is not None and v.name in self.old)
            node.replace_input_with(list(node.inputs).index(old), self._float32(name))

    def _multiply(self, node: Any, name: str, weight: Any) -> None:
        """Multiply by a float32 matrix in the model's (out, in) layout; the transpose is folded at load."""
        node.replace_input_with(1, self._derive("Transpose", f"{name}.transposed", [weight], perm=[1, 0]))

    def _float32(self, name: str) -> Any:
        import onnx_ir as ir

        tensor = self.tensors[name]
        floats = tensor.codes if isinstance(tensor, EncodedTensor) else tensor
        value = self._initializer(name, floats)
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self._derive("Cast", f"{name}.float32", [value], to=ir.DataType.FLOAT.value)

    def _use_codes(self, node: Any, name: str, tensor: EncodedTensor) -> None:
        if rounding := self.inputs.get(name.removesuffix(".weight")):
            return self._exchange(node, "Mul", self._integer_product(node, name, tensor, rounding), {}, domain="")
        n, m = tensor.codes.shape
        form, (codes, scales, zeros) = self._affine(name, tensor)
        if not has_kernel(form.bits, form.block, self.accuracy_level):
            return self._multiply(node, name, self._decoded(name, tensor, form, (codes, scales, zeros)))
        attributes = {
            "K": m,
            "N": n,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": self.accuracy_level,
        }
        self._exchange(node, "MatMulNBits", [node.inputs[0], codes, scales, *zeros], attributes)

    def _join(self, attention: Any) -> None:
        """Compute queries, keys and values of one input by one product, of codes that are joined at load.

        Only where their codes are of one form and no bias or norm lies between the products and the attention.
        """
        import onnx_ir as ir

        products: list[Any] = [value.producer() for value in attention.inputs[:3] if value is not None]
        if len(products) < 3 or any(node is None or node.op_type != "MatMulNBits" for node in products):
            return
        forms = {
            (node.inputs[0], len(node.inputs), *(node.attributes[a].as_int() for a in ("K", "bits", "block_size")))
            for node in products
        }
        if len(forms) != 1 or any(len(node.outputs[0].uses()) != 1 for node in products):
            return
        first = products[0]
        label = first.inputs[1].name.removesuffix(".codes").replace("q_proj", "qkv_proj")
        parts = zip(*(node.inputs[1:] for node in products), strict=True)
        kinds = ("codes", "scales", "zero_points")
        joined = [
            self._derive("Concat", f"{label}.{kind}", list(part), axis=0)
            for kind, part in zip(kinds, parts, strict=False)
        ]
        rows = sum(node.attributes["N"].as_int() for node in products)
        attributes = {name: a.as_int() for name, a in first.attributes.items()} | {"N": rows}
        node = ir.node(
            "MatMulNBits", [first.inputs[0], *joined], attributes, domain=MICROSOFT, name=f"{label}/MatMulNBits"
        )
        node.outputs[0].name = f"{label}/output"
        self.graph.append(node)
        for index, value in enumerate((node.outputs[0], None, None)):
            attention.replace_input_with(index, value)
        self.graph.remove(products, safe=True)

    def _integer_product(self, node: Any, name: str, tensor: EncodedTensor, rounding: InputRounding) -> list[Any]:
        """Two factors of the product: the sum of products of codes times the inputs' scale, and the rows' scales.

        Both operands are unsigned around 128: signed ones saturate in the kernels of processors without VNNI.
        """
        import onnx_ir as ir

        (n, m), (_, (codes, scales, _)) = tensor.codes.shape, self._affine(name, tensor)
        columns = self._derive(
            "Transpose", f"{name}.columns", [self._reshape(f"{name}.rows", codes, [n, m])], perm=[1, 0]
        )
        inputs, scale = self._rounded_inputs(node.inputs[0], rounding)
        middle = self._constant("middle.uint8", 128, "uint8")
        sums = self._derive("MatMulInteger", f"{name}.integers", [inputs, columns, middle, middle])
        floats = self._derive("Cast", f"{name}.sums", [sums], to=ir.DataType.FLOAT.value)
        first = self._derive("Slice", f"{name}.scales.first", [scales, *self._integers([0], [1], [1])])
        rows = self._reshape(f"{name}.scales.rows", first, [n])
        return [self._derive("Mul", f"{name}.scaled_inputs", [floats, scale]), rows]

    def _rounded_inputs(self, x: Any, rounding: InputRounding) -> tuple[Any, Any]:
        """Codes of x as uint8 around 128, and their scale: one number, or one per token (…, 1).

        Linears that share an input and its scale share its codes.
        """
        import onnx_ir as ir

        label = f"{x.name}.{rounding.scheme}"
        if rounding.scheme == "static":
            label += f".{rounding.scale}"
            scale = self._constant(f"{label}.scale", rounding.scale, "float32")
            middle = self._constant("middle.uint8", 128, "uint8")
            return self._derive("QuantizeLinear", f"{label}.codes", [x, scale, middle]), scale
        most = self._derive("Abs", f"{label}.magnitudes", [x])
        most = self._derive("ReduceMax", f"{label}.largest", [most, *self._integers([-1])], keepdims=1)
        most = self._derive("Max", f"{label}.positive", [most, self._constant("tiny", TINY, "float32")])
        scale = self._derive("Div", f"{label}.scale", [most, self._constant("steps", 127.0, "float32")])
        codes = self._derive("Round", f"{label}.rounded", [self._derive("Div", f"{label}.steps", [x, scale])])
        codes = self._derive("Add", f"{label}.unsigned", [codes, self._constant("middle.float32", 128.0, "float32")])
        return self._derive("Cast", f"{label}.codes", [codes], to=ir.DataType.UINT8.value), scale

    def _use_gather_block_quantized(self, node: Any, name: str, tensor: EncodedTensor) -> None:
        form, (codes, scales, zeros) = self._affine(name, tensor)
        rows = self._reshape(f"{name}.rows", codes, [tensor.codes.shape[0], -1])
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block, "bits": form.bits}
        self._exchange(node, "GatherBlockQuantized", [rows, node.inputs[1], scales, *zeros], attributes)

    def _decoded(self, name: str, tensor: EncodedTensor, form: Packed, values: tuple[Any, Any, list[Any]]) -> Any:
        """The float32 matrix (codes - zero_points) * scales, by plain operators that are folded at load.

        GatherBlockQuantized over all rows would say the same, but onnxruntime 1.32 does not fold it.
        """
        codes, scales, zeros = values
        n, blocks = form.scales.shape
        floats = self._floats(f"{name}.codes", codes, form.bits, [n, blocks, form.block])
        if zeros:
            zero = self._reshape(f"{name}.zero_points.rows", zeros[0], [n, -1, 1])
            zero = self._floats(f"{name}.zero_points", zero, form.bits, [n, -1, 1])
            zero = self._derive("Slice", f"{name}.zero_points.cut", [zero, *self._integers([0], [blocks], [1])])
        else:
            zero = self._constant(f"middle.{form.bits}", float(2 ** (form.bits - 1)), "float32")
        centred = self._derive("Sub", f"{name}.centred", [floats, zero])
        scale = self._reshape(f"{name}.scales.blocks", scales, [n, blocks, 1])
        scaled = self._derive("Mul", f"{name}.scaled", [centred, scale])
        return self._reshape(f"{name}.decoded", scaled, list(tensor.codes.shape))

    def _floats(self, name: str, packed_codes: Any, bits: int, shape: list[int]) -> Any:
        """Packed unsigned codes as float32 of `shape`."""
        import onnx_ir as ir

        lanes = packed_codes
        if bits < 8:
            shifts = self._constant(f"shifts.{bits}", list(range(0, 8, bits)), "uint8")
            lanes = self._derive("Unsqueeze", f"{name}.lanes", [lanes, *self._integers([-1])])
            lanes = self._derive("BitShift", f"{name}.shifted", [lanes, shifts], direction="RIGHT")
            mask = self._constant(f"mask.{bits}", 2**bits - 1, "uint8")
            lanes = self._derive("BitwiseAnd", f"{name}.masked", [lanes, mask])
            lanes = self._reshape(f"{name}.unpacked", lanes, shape)
        return self._derive("Cast", f"{name}.float32", [lanes], to=ir.DataType.FLOAT.value)

    def _reshape(self, name: str, value: Any, shape: list[int]) -> Any:
        return self._derive("Reshape", name, [value, *self._integers(shape)])

    def _integers(self, *lists: list[int]) -> list[Any]:
        return [self._constant("integers." + "_".join(map(str, values)), values, "int64") for values in lists]

    def _constant(self, name: str, value: Any, dtype: str) -> Any:
        """A small constant, in the graph itself: shape inference cannot read external data."""
        import numpy as np
        import onnx_ir as ir

        return self._derive("Constant", name, [], value=ir.tensor(np.array(value, dtype)))

    def _affine(self, name: str, tensor: EncodedTensor) -> tuple[Packed, tuple[Any, Any, list[Any]]]:
        """The packed tensor and its values in the graph: codes, float32 scales, and zero points if any."""
        import onnx_ir as ir

        form = packed(name, tensor)
        codes = self._initializer(f"{name}.codes", form.codes)
        # float16 holds the scales exactly in half the bytes; onnxruntime folds the cast at load.
        half = self._initializer(f"{name}.scales", form.scales)
        scales = self._derive("Cast", f"{name}.scales.float32", [half], to=ir.DataType.FLOAT.value)
        zeros = []
        if form.zero_points is not None:
            zeros = [self._initializer(f"{name}.zero_points", form.zero_points)]
        return form, (codes, scales, zeros)

    def _initializer(self, name: str, tensor: Tensor) -> Any:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        if name not in self.graph.initializers:
            held = TorchTensor(tensor.detach().contiguous(), name=name)
            value = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=held.shape, const_value=held)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _derive(self, op: str, name: str, inputs: list[Any], **attributes: Any) -> Any:
        import onnx_ir as ir

        if name not in self.derived:
            node = ir.node(op, inputs, attributes, name=f"/{name}/{op}")
            node.outputs[0].name = name
            self.graph.append(node)
            self.derived[name] = node.outputs[0]
        return self.derived[name]

    def _exchange(
        self, node: Any, op: str, inputs: list[Any], attributes: Mapping[str, Any], domain: str = MICROSOFT
    ) -> None:
        """Put another node in the place of `node`, with the same output."""
        import onnx_ir as ir

        output = node.outputs[0]
        new = ir.node(op, inputs, attributes, domain=domain, name=f"{node.name}/{op}", num_outputs=1)
        new.outputs[0].type, new.outputs[0].shape = output.type, output.shape
        self.graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(output, new.outputs[0], replace_graph_outputs=True)
        name = output.name
        self.graph.remove(node, safe=True)
        new.outputs[0].name = name


def standardize(model: Any) -> None:
    """Express root-mean-square norms by the operator of ONNX opset 23, and say of constants and builder what is so.

    The builder writes SimplifiedLayerNormalization into the ONNX domain, which no ONNX opset has, the commit of
    whatever git repository surrounds its installation into its version, and of scalars that they are vectors.
    """
    import onnx_ir as ir

    if model.producer_version is not None:
        model.producer_version = model.producer_version.partition("+")[0]
    for node in model.graph:
        if node.op_type == "SimplifiedLayerNormalization" and node.domain == "":
            node.op_type = "RMSNormalization"
        if node.op_type == "Constant" and "value" in node.attributes:
            held = node.attributes["value"].as_tensor()
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(held.dtype), ir.Shape(held.shape)
    model.opset_imports[""] = max(model.opset_imports[""], 23)


def _parts(name: str, tensor: EncodedTensor | Tensor) -> list[str]:
    """Names of the initializers that hold a tensor."""
    if not isinstance(tensor, EncodedTensor) or not tensor.encoding.is_affine:
        return [name]
    zeros = [] if tensor.zero_points is None else [f"{name}.zero_points"]
    return [f"{name}.codes", f"{name}.scales", *zeros]
