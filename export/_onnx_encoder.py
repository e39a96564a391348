"""An encoder with a classification head as a graph of standard ONNX operators, written straight from the model.

As `_onnx_portable`, whose nodes and initializers it uses; here every token sees every other one, and one row of logits
per text leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.families import Encoder
from export._onnx_portable import IR_VERSION, LOWEST, Graph

if TYPE_CHECKING:
    from compress.model import Model


def build(model: Model) -> Any:
    """The model as an onnx_ir.Model: input_ids and attention_mask (batch, sequence) → logits (batch, classes).

    Raises CompressError where the model has a tensor that the graph does not use.
    """
    import onnx_ir as ir

    return ir.Model(_Encoder(model).build(), ir_version=IR_VERSION, producer_name="compress")


class _Encoder(Graph):
    """The forward pass, module by module, under the names that the model has for them."""

    def __init__(self, model: Model):
        super().__init__(dict(model.tensors()), "encoder")
        assert isinstance(model.facts.architecture, Encoder)
        self.facts, self.parts, self.module = model.facts, model.facts.architecture, model.module

    def build(self) -> Any:
        """The whole graph."""
        import onnx_ir as ir

        ids, mask = (self.input(name) for name in ("input_ids", "attention_mask"))
        self.scope = "mask"
        real = self.op("Unsqueeze", self.op("Cast", mask, to=ir.DataType.BOOL.value), self.constant([1, 2]))
        x = self._embedded(ids)
        for i in range(self.facts.layers):
            x = self._block(f"{self.parts.blocks}.{i}", x, real)
        self.scope = self.parts.pooler
        first = self.op("Gather", x, self.constant(0), axis=1)
        pooled = self.op(self.parts.pooling, self.linear(self.parts.pooler, first))
        return self.finish(self.linear(self.parts.head, pooled), "batch", len(self.facts.labels))

    def _embedded(self, ids: Any) -> Any:
        """Word, type and position embeddings, summed and normed, (b, s, residual)."""
        self.scope = self.parts.embedding
        x = self.op("Gather", self.floats(f"{self.parts.embedding}.weight"), ids, axis=0)
        if self.parts.types is not None:
            types = self.floats(f"{self.parts.types}.weight")
            x = self.op("Add", x, self.op("Gather", types, self.constant(0), axis=0))
        assert self.parts.positions is not None
        self.scope = self.parts.positions
        positions = self.op("Gather", self.floats(f"{self.parts.positions}.weight"), self._places(ids), axis=0)
        return self._norm(self.parts.final_norm, self.op("Add", x, positions))

    def _places(self, ids: Any) -> Any:
        """0 … sequence − 1, (s,); where padding has no position of its own, the count of what is none, (b, s)."""
        import onnx_ir as ir

        if not self.parts.padded_positions:
            return self.positions(ids)
        padding = self.constant(self.module.config.pad_token_id)
        words = self.op("Cast", self.op("Not", self.op("Equal", ids, padding)), to=ir.DataType.INT64.value)
        return self.op("Add", self.op("Mul", self.op("CumSum", words, self.constant(1)), words), padding)

    def _block(self, block: str, x: Any, real: Any) -> Any:
        query, key, value, out, up, down = (f"{block}.{name}" for name in self.parts.linears)
        first, second = (f"{block}.{name}" for name in self.parts.block_norms)
        q, k, v = (self._heads(module, x) for module in (query, key, value))
        self.scope = f"{block}.{self.parts.attention}"
        k = self.op("Transpose", k, perm=[0, 1, 3, 2])
        scores = self.op("Mul", self.op("MatMul", q, k), self.number(self.facts.query_scale))
        scores = self.op("Where", real, scores, self.number(LOWEST))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        rows = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        rows = self.op("Reshape", rows, self.constant([0, 0, self.facts.sizes["q"]]))
        x = self._norm(first, self.op("Add", self.linear(out, rows), x))
        inner = self.activated(self.facts.activation, self.linear(up, x))
        return self._norm(second, self.op("Add", self.linear(down, inner), x))

    def _heads(self, module: str, x: Any) -> Any:
        """One projection split into heads, (b, heads, s, d)."""
        x = self.op("Reshape", self.linear(module, x), self.constant([0, 0, self.facts.heads, self.facts.head_size]))
        return self.op("Transpose", x, perm=[0, 2, 1, 3])

    def _norm(self, module: str, x: Any) -> Any:
        return self.layer_norm(module, x, self.module.get_submodule(module).eps)
