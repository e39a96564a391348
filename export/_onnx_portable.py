"""A decoder as a graph of standard ONNX operators, written straight from the model.

Only the default domain is used, at the first opset that has 4-bit integers and blocked DequantizeLinear. The
prompt is read at once, without a key-value cache. Codes keep the model's own (out, in) layout, from which a
Transpose leads to the product: onnxruntime replaces DequantizeLinear and MatMul by a kernel with 8-bit activations
where nothing stands between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError
from compress.families import SLIDING

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

OPSET, IR_VERSION = 21, 10
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROPES = ("default", "linear", "llama3")  # rotary frequencies that do not depend on the length of the input
LOWEST = -3.4028234663852886e38  # the smallest float32: a row that sees nothing must not become NaN


def integer_type(encoding: Encoding) -> str:
    """The narrowest ONNX integer that holds the codes: opset 21 has none of 2, 3 or 5 bits.

    >>> integer_type(Encoding("int3", 32)), integer_type(Encoding("int8", 32, symmetric=False))
    ('int4', 'uint8')
    """
    return f"{'' if encoding.symmetric else 'u'}int{4 if encoding.bits <= 4 else 8}"


def build(model: Model) -> Any:
    """The model as an onnx_ir.Model: input_ids and attention_mask (batch, sequence) → logits.

    Raises CompressError where the model has a tensor that the graph does not use.
    """
    import onnx_ir as ir

    graph = _Decoder(model).build()
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="compress")


class Graph:
    """Nodes and initializers; every node is named by the part of the model that it belongs to."""

    def __init__(self, tensors: Mapping[str, EncodedTensor | Tensor], name: str):
        import onnx_ir as ir

        self.tensors = tensors
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET})
        self.shared: dict[Any, Any] = {}  # constants and converted weights, by what they are
        self.scope = ""

    def op(self, kind: str, *inputs: Any, name: str = "", **attributes: Any) -> Any:
        """The output of a new node; name: of the value, by default its place in the graph."""
        import onnx_ir as ir

        label = f"{self.scope}/{kind}_{len(self.graph)}"
        node = ir.node(kind, inputs, attributes, name=label)
        node.outputs[0].name = name or label
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: str = "int64") -> Any:
        """A small constant, in the graph itself: shape inference reads no external data."""
        import numpy as np
        import onnx_ir as ir

        array = np.array(value, dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = self.op("Constant", value=ir.tensor(array))
        return self.shared[key]

    def initializer(self, name: str, held: Any) -> Any:
        """A stored tensor; held: an onnx_ir tensor."""
        import onnx_ir as ir

        value = ir.Value(name=name, type=ir.TensorType(held.dtype), shape=held.shape, const_value=held)
        self.graph.register_initializer(value)
        return value

    def floats(self, name: str) -> Any:
        """The tensor `name` in float32 and its own layout, whatever it is stored in; one node for all its readers."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        if name not in self.shared:
            tensor = self.tensors[name]
            if isinstance(tensor, EncodedTensor) and tensor.encoding.is_affine:
                self.shared[name] = self._dequantized(name, tensor)
            else:
                stored = tensor.codes if isinstance(tensor, EncodedTensor) else tensor
                value = self.initializer(name, TorchTensor(stored.detach().contiguous(), name=name))
                if value.dtype != ir.DataType.FLOAT:
                    value = self.op("Cast", value, name=f"{name}.float32", to=ir.DataType.FLOAT.value)
                self.shared[name] = value
        return self.shared[name]

    def input(self, name: str, length: str = "sequence", width: int | None = None) -> Any:
        """An input of integers, (batch, length), or of floats, (batch, length, width)."""
        import onnx_ir as ir

        kind = ir.DataType.INT64 if width is None else ir.DataType.FLOAT
        shape = ["batch", length, *([] if width is None else [width])]
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def number(self, value: float) -> Any:
        """A float32 constant."""
        return self.constant(value, "float32")

    def positions(self, ids: Any) -> Any:
        """0 … sequence - 1, (s,)."""
        length = self.op("Squeeze", self.op("Shape", ids, start=1, end=2))
        return self.op("Range", self.constant(0), length, self.constant(1))

    def linear(self, module: str, x: Any) -> Any:
        """The product with Wᵀ, and the bias if the model has one."""
        self.scope = module
        bias = f"{module}.bias"
        x = self.op("MatMul", x, self.op("Transpose", self.floats(f"{module}.weight"), perm=[1, 0]))
        return self.op("Add", x, self.floats(bias)) if bias in self.tensors else x

    def layer_norm(self, module: str, x: Any, epsilon: float) -> Any:
        """Centred and scaled over the last axis, with the module's gain and bias."""
        self.scope = module
        gain, bias = self.floats(f"{module}.weight"), self.floats(f"{module}.bias")
        return self.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=epsilon)

    def rms_norm(self, module: str, x: Any, epsilon: float, offset: float = 0.0) -> Any:
        """Over the last axis: x / √(mean x² + ε) · (gain + offset)."""
        self.scope = module
        gain = self.floats(f"{module}.weight")
        if offset:
            gain = self.op("Add", gain, self.number(offset), name=f"{module}.weight.gain")
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.number(epsilon)))
        return self.op("Mul", self.op("Div", x, root), gain)

    def activated(self, kind: str, x: Any) -> Any:
        """One of `ACTIVATIONS`."""
        if kind == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if kind == "relu":
            return self.op("Relu", x)
        return self.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def finish(self, out: Any, *shape: str | int, name: str = "logits") -> Any:
        """The graph with its one output; raises CompressError where a tensor of the model is not used."""
        import onnx_ir as ir

        out.name = name
        out.type = ir.TensorType(ir.DataType.FLOAT)
        out.shape = ir.Shape(shape)
        self.graph.outputs.append(out)
        if left := self.tensors.keys() - self.shared.keys():
            raise CompressError(f"the ONNX graph does not use {', '.join(sorted(left)[:5])}")
        return self.graph

    def _dequantized(self, name: str, tensor: EncodedTensor) -> Any:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        assert tensor.scales is not None
        kind = integer_type(tensor.encoding)
        codes = self.initializer(f"{name}.codes", _integers(tensor.codes, kind, f"{name}.codes"))
        half = self.initializer(f"{name}.scales", TorchTensor(tensor.scales.contiguous(), name=f"{name}.scales"))
        # The result has the scales' type: a product rounded to float16 would be another weight.
        inputs = [codes, self.op("Cast", half, name=f"{name}.scales.float32", to=ir.DataType.FLOAT.value)]
        if tensor.zero_points is not None:
            zeros = _integers(tensor.zero_points, kind, f"{name}.zero_points")
            inputs.append(self.initializer(f"{name}.zero_points", zeros))
        block = tensor.codes.shape[1] // tensor.scales.shape[1]
        return self.op("DequantizeLinear", *inputs, name=f"{name}.float32", axis=1, block_size=block)


def _integers(codes: Tensor, kind: str, name: str) -> Any:
    import ml_dtypes
    import onnx_ir as ir

    array = codes.numpy()
    return ir.Tensor(array.astype(getattr(ml_dtypes, kind)) if kind.endswith("int4") else array, name=name)


@dataclass(frozen=True)
class _Rotation:
    """Cosines and sines of every position and rotated channel of a head, (s, channels) each."""

    cosines: Any
    sines: Any
    channels: int


class _Decoder(Graph):
    """The forward pass, module by module, under the names that the model has for them."""

    def __init__(self, model: Model):
        super().__init__(dict(model.tensors()), "decoder")
        self.facts = model.facts
        self.parts = model.facts.architecture
        self.epsilon = float(getattr(model.module.config, self.parts.keys["epsilon"]))
        self.rotary: Any = None if self.parts.positions else model.module.base_model.rotary_emb

    def build(self) -> Any:
        """The whole graph."""
        ids, mask = (self.input(name) for name in ("input_ids", "attention_mask"))
        self.scope = "positions"
        positions = self.positions(ids)
        kinds = self.facts.kinds or ("",) * self.facts.layers
        allowed = {kind: self._allowed(kind, positions, mask) for kind in dict.fromkeys(kinds)}
        rotation = {kind: self._rotation(kind, positions) for kind in allowed if self.rotary is not None}
        x = self._embedded(ids, mask)
        for i, kind in enumerate(kinds):
            x = self._block(f"{self.parts.blocks}.{i}", x, rotation.get(kind), allowed[kind])
        x = self._norm(self.parts.final_norm, x)
        head = self.facts.embedding_tensor if self.facts.tied else f"{self.parts.head}.weight"
        self.scope = self.parts.head
        logits = self.op("MatMul", x, self.op("Transpose", self.floats(head), perm=[1, 0]))
        if self.facts.logit_cap is not None:
            logits = self._capped(logits, self.facts.logit_cap)
        return self.finish(logits, "batch", "sequence", self.facts.vocabulary)

    def _embedded(self, ids: Any, mask: Any) -> Any:
        """What enters the first block; learned positions are counted from the first token that is not masked."""
        self.scope = self.parts.embedding
        x = self.op("Gather", self.floats(self.facts.embedding_tensor), ids, axis=0)
        if self.parts.scaled_embedding:
            x = self.op("Mul", x, self.number(self.facts.sizes["residual"] ** 0.5))
        if self.parts.positions is not None:
            before = self.op("Sub", self.op("CumSum", mask, self.constant(1)), self.constant(1))
            places = self.op("Max", before, self.constant(0))
            x = self.op("Add", x, self.op("Gather", self.floats(f"{self.parts.positions}.weight"), places, axis=0))
        return x

    def _allowed(self, kind: str, positions: Any, mask: Any) -> Any:
        """Whether a position may look at another: no later, masked or too distant one; (b, 1, 1, s, s) bool."""
        import onnx_ir as ir

        rows = self.op("Unsqueeze", positions, self.constant([1]))
        columns = self.op("Unsqueeze", positions, self.constant([0]))
        seen = self.op("LessOrEqual", columns, rows)
        if kind == SLIDING and self.facts.window is not None:
            near = self.op("Less", self.op("Sub", rows, columns), self.constant(self.facts.window))
            seen = self.op("And", seen, near)
        real = self.op("Cast", mask, to=ir.DataType.BOOL.value)
        return self.op("And", seen, self.op("Unsqueeze", real, self.constant([1, 2, 3])))

    def _rotation(self, kind: str, positions: Any) -> _Rotation:
        import onnx_ir as ir

        several = getattr(self.rotary, f"{kind}_inv_freq", None)  # where they differ between kinds of blocks
        held = self.rotary.inv_freq if several is None else several
        frequencies = self.constant(held.float().numpy()[None], "float32")
        column = self.op("Unsqueeze", positions, self.constant([1]))
        angles = self.op("Mul", self.op("Cast", column, to=ir.DataType.FLOAT.value), frequencies)
        both = self.op("Concat", angles, angles, axis=-1)
        return _Rotation(self.op("Cos", both), self.op("Sin", both), 2 * held.numel())

    def _block(self, block: str, x: Any, rotation: _Rotation | None, allowed: Any) -> Any:
        first, second = self.parts.block_norms
        x = self._add(block, x, self._attention(block, self._norm(f"{block}.{first}", x), rotation, allowed))
        return self._add(block, x, self._mlp(block, self._norm(f"{block}.{second}", x)), name=block)

    def _add(self, scope: str, x: Any, y: Any, name: str = "") -> Any:
        self.scope = scope
        return self.op("Add", x, y, name=name)

    def _norm(self, module: str, x: Any) -> Any:
        """As the architecture norms."""
        if self.parts.centred:
            return self.layer_norm(module, x, self.epsilon)
        return self.rms_norm(module, x, self.epsilon, self.parts.offset(f"{module}.weight"))

    def _stage(self, number: int, block: str, x: Any) -> list[Any]:
        """Products of the linears of a block that read x, what a fused one stacks in parts of their own."""
        found = []
        for name in self.parts.stages[number]:
            product, start = self.linear(f"{block}.{name}", x), 0
            axes, _ = self.facts.axes(name)
            for axis in axes:
                end = start + self.facts.sizes[axis]
                found.append(product if len(axes) == 1 else self._channels(product, start, end))
                start = end
        return found

    def _closed(self, number: int, block: str, x: Any) -> Any:
        """The product of the one linear that ends a submodule, normed where the architecture does so."""
        (product,) = self._stage(number, block, x)
        norm = self.parts.post_norms.get(self.parts.stages[number][0])
        return product if norm is None else self._norm(f"{block}.{norm}", product)

    def _channels(self, x: Any, start: int, end: int) -> Any:
        """Some neighbouring channels of the last axis."""
        return self.op("Slice", x, self.constant([start]), self.constant([end]), self.constant([-1]))

    def _attention(self, block: str, x: Any, rotation: _Rotation | None, allowed: Any) -> Any:
        """Query heads stand in groups beside the key and value head that they share, (b, kv, group, s, d)."""
        module, groups = f"{block}.{self.parts.attention}", self.facts.heads // self.facts.kv_heads
        q, k, v = self._stage(0, block, x)
        self.scope = module
        q = self._rotated(self._heads(f"{module}.q_norm", q, groups), rotation)
        k = self._rotated(self._heads(f"{module}.k_norm", k, 1), rotation)
        v = self._heads("", v, 1)
        self.scope = module
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
        scores = self.op("Mul", scores, self.number(self.facts.query_scale))
        if self.facts.attention_cap is not None:
            scores = self._capped(scores, self.facts.attention_cap)
        scores = self.op("Where", allowed, scores, self.number(LOWEST))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        rows = self.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        rows = self.op("Reshape", rows, self.constant([0, 0, self.facts.sizes["q"]]))
        return self._closed(1, block, rows)

    def _heads(self, norm: str, x: Any, groups: int) -> Any:
        """One projection split into heads, (b, kv, groups, s, d), normalized where the model does so."""
        shape = [0, 0, self.facts.kv_heads, groups, self.facts.head_size]
        x = self.op("Reshape", x, self.constant(shape))
        if f"{norm}.weight" in self.tensors:
            x = self._norm(norm, x)
        return self.op("Transpose", x, perm=[0, 2, 3, 1, 4])

    def _rotated(self, x: Any, rotation: _Rotation | None) -> Any:
        """Channel j of a head turned with channel j + r / 2, of the r that the model rotates."""
        if rotation is None:
            return x
        d, r = self.facts.head_size, rotation.channels
        turning = x if r == d else self._channels(x, 0, r)
        first, second = self._channels(turning, 0, r // 2), self._channels(turning, r // 2, r)
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        turned = self.op("Add", self.op("Mul", turning, rotation.cosines), self.op("Mul", turned, rotation.sines))
        return turned if r == d else self.op("Concat", turned, self._channels(x, r, d), axis=-1)

    def _mlp(self, block: str, x: Any) -> Any:
        gate, *up = self._stage(2, block, x)
        self.scope = f"{block}.mlp"
        inner = self.activated(self.facts.activation, gate)
        return self._closed(3, block, self.op("Mul", inner, up[0]) if up else inner)

    def _capped(self, x: Any, cap: float) -> Any:
        """The soft cap c · tanh(x / c)."""
        return self.op("Mul", self.op("Tanh", self.op("Div", x, self.number(cap))), self.number(cap))
