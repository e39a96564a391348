"""An encoder-decoder as two graphs of standard ONNX operators, written straight from the model.

As `_onnx_portable`, whose nodes and initializers they use. The encoder reads a source once; the decoder reads a target
and the encoder's states at once, without a key-value cache. What the model has once, as a shared embedding, is stored
once. Inputs and outputs have the names that optimum's ORTModelForSeq2SeqLM knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.families import EncoderDecoder
from export._onnx_portable import IR_VERSION, LOWEST, Graph

if TYPE_CHECKING:
    from compress.model import Model


def build(model: Model) -> tuple[Any, Any]:
    """Encoder and decoder as onnx_ir.Models.

    Encoder: input_ids and attention_mask (batch, sequence) → last_hidden_state (batch, sequence, width). Decoder:
    input_ids (batch, sequence), encoder_hidden_states (batch, encoder_sequence, width) and encoder_attention_mask
    (batch, encoder_sequence) → logits (batch, sequence, vocabulary).
    Raises CompressError where the model has a tensor that neither graph uses.
    """
    import onnx_ir as ir

    halves = (_Encoder(model).build(), _Decoder(model).build())
    first, second = (ir.Model(graph, ir_version=IR_VERSION, producer_name="compress") for graph in halves)
    return first, second


class _Half(Graph):
    """What both halves compute alike, under the names that the model has for it."""

    def __init__(self, model: Model, name: str, blocks: str):
        arch = model.facts.architecture
        assert isinstance(arch, EncoderDecoder)
        self.facts, self.parts, self.blocks = model.facts, arch, blocks
        other = arch.blocks if blocks == arch.encoder_blocks else arch.encoder_blocks
        left_out = (f"{other.partition('.')[0]}.", *([f"{arch.head}."] if other == arch.blocks else []))
        super().__init__({n: t for n, t in model.tensors() if not n.startswith(left_out)}, name)
        self.epsilon = float(getattr(model.module.config, arch.keys["epsilon"]))
        self.first = model.module.get_submodule(f"{blocks}.0.{arch.attention}")

    def embedded(self, ids: Any) -> Any:
        """Rows of the shared embedding, (b, s, width)."""
        self.scope = self.parts.embedding
        return self.op("Gather", self.floats(self.facts.embedding_tensor), ids, axis=0)

    def norm(self, module: str, x: Any) -> Any:
        """Over the last axis, without centring."""
        return self.rms_norm(module, x, self.epsilon)

    def seen(self, mask: Any) -> Any:
        """Which tokens are no padding, (b, 1, 1, s) bool."""
        import onnx_ir as ir

        real = self.op("Cast", mask, to=ir.DataType.BOOL.value)
        return self.op("Unsqueeze", real, self.constant([1, 2]))

    def biases(self, positions: Any) -> Any:
        """What distance adds to the scores of self-attention, (1, heads, s, s).

        Buckets are looked up by distance, as the model sorts them: beyond the largest all are alike.
        """
        import torch

        name = f"{self.blocks}.0.{self.parts.distances}"
        self.scope = name
        farthest = int(self.first.relative_attention_max_distance)
        buckets = self.first._relative_position_bucket(
            torch.arange(-farthest, farthest + 1),
            bidirectional=not self.first.is_decoder,
            num_buckets=self.first.relative_attention_num_buckets,
            max_distance=farthest,
        )
        rows = self.op("Unsqueeze", positions, self.constant([1]))
        columns = self.op("Unsqueeze", positions, self.constant([0]))
        near = self.op("Min", self.op("Sub", columns, rows), self.constant(farthest))
        near = self.op("Max", near, self.constant(-farthest))
        rank = self.op("Add", near, self.constant(farthest))
        places = self.op("Gather", self.constant(buckets.numpy()), rank, axis=0)
        found = self.op("Gather", self.floats(f"{name}.weight"), places, axis=0)
        return self.op("Unsqueeze", self.op("Transpose", found, perm=[2, 0, 1]), self.constant([0]))

    def attention(self, module: str, x: Any, read: Any, allowed: Any, bias: Any = None) -> Any:
        """Queries from x; keys and values from what is read: x itself, or the encoder's states."""
        q, k, v = (self._heads(f"{module}.{part}", y) for part, y in (("q", x), ("k", read), ("v", read)))
        self.scope = module
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        if bias is not None:
            scores = self.op("Add", scores, bias)
        scores = self.op("Where", allowed, scores, self.number(LOWEST))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        rows = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        rows = self.op("Reshape", rows, self.constant([0, 0, self.facts.sizes["q"]]))
        return self.linear(f"{module}.o", rows)

    def mlp(self, module: str, x: Any) -> Any:
        """Gated where the model has a second matrix for it."""
        gated = f"{module}.wi_0.weight" in self.tensors
        inner = self.activated(self.facts.activation, self.linear(f"{module}.wi_0" if gated else f"{module}.wi", x))
        if gated:
            inner = self.op("Mul", inner, self.linear(f"{module}.wi_1", x))
        return self.linear(f"{module}.wo", inner)

    def _heads(self, module: str, x: Any) -> Any:
        """One projection split into heads, (b, heads, s, d)."""
        x = self.op("Reshape", self.linear(module, x), self.constant([0, 0, self.facts.heads, self.facts.head_size]))
        return self.op("Transpose", x, perm=[0, 2, 1, 3])


class _Encoder(_Half):
    """The source's half: every token sees every other one."""

    def __init__(self, model: Model):
        super().__init__(model, "encoder", model.facts.architecture.encoder_blocks)  # type: ignore[attr-defined]

    def build(self) -> Any:
        """The whole graph."""
        ids, mask = (self.input(name) for name in ("input_ids", "attention_mask"))
        self.scope = "mask"
        seen, bias = self.seen(mask), self.biases(self.positions(ids))
        x = self.embedded(ids)
        for i in range(self.facts.encoder_layers):
            first, second = (f"{self.blocks}.{i}.layer.{k}" for k in range(2))
            y = self.norm(f"{first}.layer_norm", x)
            x = self.op("Add", x, self.attention(f"{first}.SelfAttention", y, y, seen, bias))
            x = self.op("Add", x, self.mlp(f"{second}.DenseReluDense", self.norm(f"{second}.layer_norm", x)))
        x = self.norm(self.parts.encoder_final_norm, x)
        return self.finish(x, "batch", "sequence", self.facts.sizes["residual"], name="last_hidden_state")


class _Decoder(_Half):
    """The target's half: a token sees those before it, and all of the source."""

    def __init__(self, model: Model):
        super().__init__(model, "decoder", model.facts.architecture.blocks)

    def build(self) -> Any:
        """The whole graph."""
        ids, width, source = self.input("input_ids"), self.facts.sizes["residual"], "encoder_sequence"
        states = self.input("encoder_hidden_states", source, width)
        self.scope = "mask"
        seen, positions = self.seen(self.input("encoder_attention_mask", source)), self.positions(ids)
        rows = self.op("Unsqueeze", positions, self.constant([1]))
        earlier = self.op("LessOrEqual", self.op("Unsqueeze", positions, self.constant([0])), rows)
        bias, x = self.biases(positions), self.embedded(ids)
        for i in range(self.facts.layers):
            own, across, last = (f"{self.blocks}.{i}.layer.{k}" for k in range(3))
            y = self.norm(f"{own}.layer_norm", x)
            x = self.op("Add", x, self.attention(f"{own}.SelfAttention", y, y, earlier, bias))
            y = self.norm(f"{across}.layer_norm", x)
            x = self.op("Add", x, self.attention(f"{across}.EncDecAttention", y, states, seen))
            x = self.op("Add", x, self.mlp(f"{last}.DenseReluDense", self.norm(f"{last}.layer_norm", x)))
        x = self.norm(self.parts.final_norm, x)
        self.scope = self.parts.head
        if self.facts.output_scale != 1.0:
            x = self.op("Mul", x, self.number(self.facts.output_scale))
        head = self.facts.embedding_tensor if self.facts.tied else f"{self.parts.head}.weight"
        logits = self.op("MatMul", x, self.op("Transpose", self.floats(head), perm=[1, 0]))
        return self.finish(logits, "batch", "sequence", self.facts.vocabulary)


def tensors_of(graph: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's tensors that a built half holds, in the model's order."""
    held = graph.graph.initializers
    return {name: tensor for name, tensor in tensors.items() if name in held or f"{name}.codes" in held}
