"""A decoder of the Llama family as a graph of standard ONNX operators, written straight from the model.

Only the default domain is used, at the first opset that has 4-bit integers and blocked DequantizeLinear. The
prompt is read at once, without a key-value cache. Codes keep the model's own (out, in) layout, from which a
Transpose leads to the product: onnxruntime replaces DequantizeLinear and MatMul by a kernel with 8-bit activations
where nothing stands between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

OPSET, IR_VERSION = 21, 10
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

    def input(self, name: str) -> Any:
        """An input of integers, (batch, sequence)."""
        import onnx_ir as ir

        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
        self.graph.inputs.append(value)
        return value

    def linear(self, module: str, x: Any, name: str = "") -> Any:
        """The product with Wᵀ, and the bias if the model has one; name: of the value."""
        self.scope = module
        bias = f"{module}.bias"
        W = self.op("Transpose", self.floats(f"{module}.weight"), perm=[1, 0])
        x = self.op("MatMul", x, W, name="" if bias in self.tensors else name)
        return self.op("Add", x, self.floats(bias), name=name) if bias in self.tensors else x

    def finish(self, logits: Any, *shape: str | int) -> Any:
        """The graph with its one output; raises CompressError where a tensor of the model is not used."""
        import onnx_ir as ir

        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(shape)
        self.graph.outputs.append(logits)
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


class _Decoder(Graph):
    """The forward pass, module by module, under the names that the model has for them."""

    def __init__(self, model: Model):
        super().__init__(dict(model.tensors()), "decoder")
        self.facts = model.facts
        self.parts = model.facts.architecture
        self.config = model.module.config
        self.rotary = model.module.base_model.rotary_emb

    def build(self) -> Any:
        """The whole graph."""
        ids, mask = (self.input(name) for name in ("input_ids", "attention_mask"))
        self.scope = "positions"
        positions = self._positions(ids)
        allowed = self._allowed(positions, mask)
        rotation = self._rotation(positions)
        self.scope = self.parts.embedding
        x = self.op("Gather", self.floats(self.facts.embedding_tensor), ids, axis=0)
        for i in range(self.facts.layers):
            x = self._block(f"{self.parts.blocks}.{i}", x, rotation, allowed)
        x = self._norm(self.parts.final_norm, x)
        head = self.facts.embedding_tensor if self.facts.tied else f"{self.parts.head}.weight"
        self.scope = self.parts.head
        logits = self.op("MatMul", x, self.op("Transpose", self.floats(head), perm=[1, 0]), name="logits")
        return self.finish(logits, "batch", "sequence", self.facts.vocabulary)

    def _positions(self, ids: Any) -> Any:
        """0 … sequence - 1, (s,)."""
        length = self.op("Squeeze", self.op("Shape", ids, start=1, end=2))
        return self.op("Range", self.constant(0), length, self.constant(1))

    def _allowed(self, positions: Any, mask: Any) -> Any:
        """Whether a position may look at another: no later one, and none that is masked; (b, 1, 1, s, s) bool."""
        import onnx_ir as ir

        rows = self.op("Unsqueeze", positions, self.constant([1]))
        columns = self.op("Unsqueeze", positions, self.constant([0]))
        causal = self.op("LessOrEqual", columns, rows)
        real = self.op("Cast", mask, to=ir.DataType.BOOL.value)
        return self.op("And", causal, self.op("Unsqueeze", real, self.constant([1, 2, 3])))

    def _rotation(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines of every position and channel of a head, (s, d) each."""
        import onnx_ir as ir

        frequencies = self.constant(self.rotary.inv_freq.float().numpy()[None], "float32")
        column = self.op("Unsqueeze", positions, self.constant([1]))
        angles = self.op("Mul", self.op("Cast", column, to=ir.DataType.FLOAT.value), frequencies)
        both = self.op("Concat", angles, angles, axis=-1)
        return self.op("Cos", both), self.op("Sin", both)

    def _block(self, block: str, x: Any, rotation: tuple[Any, Any], allowed: Any) -> Any:
        first, second = self.parts.block_norms
        x = self._add(block, x, self._attention(block, self._norm(f"{block}.{first}", x), rotation, allowed))
        return self._add(block, x, self._mlp(block, self._norm(f"{block}.{second}", x)), name=block)

    def _add(self, scope: str, x: Any, y: Any, name: str = "") -> Any:
        self.scope = scope
        return self.op("Add", x, y, name=name)

    def _norm(self, module: str, x: Any) -> Any:
        """Root-mean-square norm: x / √(mean x² + ε) · gain, over the last axis."""
        self.scope = module
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(self.config.rms_norm_eps, "float32")))
        return self.op("Mul", self.op("Div", x, root), self.floats(f"{module}.weight"))

    def _attention(self, block: str, x: Any, rotation: tuple[Any, Any], allowed: Any) -> Any:
        """Query heads stand in groups beside the key and value head that they share, (b, kv, group, s, d)."""
        module, groups = f"{block}.self_attn", self.facts.heads // self.facts.kv_heads
        q = self._rotated(self._heads(module, "q", x, groups), rotation)
        k = self._rotated(self._heads(module, "k", x, 1), rotation)
        v = self._heads(module, "v", x, 1)
        self.scope = module
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
        scores = self.op("Mul", scores, self.constant(self.facts.head_size**-0.5, "float32"))
        scores = self.op("Where", allowed, scores, self.constant(LOWEST, "float32"))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        rows = self.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        rows = self.op("Reshape", rows, self.constant([0, 0, self.facts.sizes["q"]]))
        return self.linear(f"{module}.o_proj", rows)

    def _heads(self, module: str, part: str, x: Any, groups: int) -> Any:
        """One projection split into heads, (b, kv, groups, s, d), normalized where the model does so."""
        x = self.linear(f"{module}.{part}_proj", x)
        shape = [0, 0, self.facts.kv_heads, groups, self.facts.head_size]
        x = self.op("Reshape", x, self.constant(shape))
        norm = f"{module}.{part}_norm"
        if f"{norm}.weight" in self.tensors:
            x = self._norm(norm, x)
        return self.op("Transpose", x, perm=[0, 2, 3, 1, 4])

    def _rotated(self, x: Any, rotation: tuple[Any, Any]) -> Any:
        """Channel j of a head turned with channel j + d / 2."""
        d, last = self.facts.head_size, self.constant([-1])
        first = self.op("Slice", x, self.constant([0]), self.constant([d // 2]), last)
        second = self.op("Slice", x, self.constant([d // 2]), self.constant([d]), last)
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, rotation[0]), self.op("Mul", turned, rotation[1]))

    def _mlp(self, block: str, x: Any) -> Any:
        gate, up = (self.linear(f"{block}.mlp.{name}", x) for name in ("gate_proj", "up_proj"))
        self.scope = f"{block}.mlp"
        inner = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.linear(f"{block}.mlp.down_proj", inner)
