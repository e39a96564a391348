"""Architectures by family, as tables: which tensors a model has, their shapes, and how channels connect them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Sizes of a tensor's axes, by symbol; `Facts` computes them from a config.
# residual: the hidden state. q, kv: query and key/value heads times head size. mlp: the MLP's inner width.
# positions, types, labels: rows of an encoder's matrices outside its blocks; pooled: what its pooler makes.
# qkv and gate_up are stacked: several axes in one, in the order in which the fused linear holds them.
STACKED = {"qkv": ("q", "kv", "kv"), "gate_up": ("mlp", "mlp")}
_LLAMA_LINEARS = {
    "self_attn.q_proj": ("q", "residual"),
    "self_attn.k_proj": ("kv", "residual"),
    "self_attn.v_proj": ("kv", "residual"),
    "self_attn.o_proj": ("residual", "q"),
    "mlp.gate_proj": ("mlp", "residual"),
    "mlp.up_proj": ("mlp", "residual"),
    "mlp.down_proj": ("residual", "mlp"),
}
_PHI3_LINEARS = {
    "self_attn.qkv_proj": ("qkv", "residual"),
    "self_attn.o_proj": ("residual", "q"),
    "mlp.gate_up_proj": ("gate_up", "residual"),
    "mlp.down_proj": ("residual", "mlp"),
}
_GPT2_LINEARS = {
    "attn.c_attn": ("qkv", "residual"),
    "attn.c_proj": ("residual", "q"),
    "mlp.c_fc": ("mlp", "residual"),
    "mlp.c_proj": ("residual", "mlp"),
}
# Linears of a block that read the same activation, in the order in which a block computes them: what makes queries,
# keys and values; what reads them; what makes the MLP's inner channels (gate first); what reads those.
_LLAMA_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_PHI3_STAGES = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
_GPT2_STAGES = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
# A module and the linears that read its output channels as they are, or multiplied by others: dividing a channel
# of the one (a norm's gain, a linear's row) and multiplying the columns of the others changes no function.
# Of a fused linear, the last of its stacked axes (values, the MLP's upper half) is what is read so.
_LLAMA_FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
_GEMMA2_FOLDS = (*_LLAMA_FOLDS[:2], ("pre_feedforward_layernorm", _LLAMA_FOLDS[2][1]), _LLAMA_FOLDS[3])
_PHI3_FOLDS = (
    ("input_layernorm", ("self_attn.qkv_proj",)),
    ("self_attn.qkv_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ("mlp.gate_up_proj", ("mlp.down_proj",)),
)
_GPT2_FOLDS = (  # none around the MLP's activation: gelu(s x) is not s gelu(x)
    ("ln_1", ("attn.c_attn",)),
    ("attn.c_attn", ("attn.c_proj",)),
    ("ln_2", ("mlp.c_fc",)),
)
# What a config calls the sizes and constants.
_KEYS = {
    "layers": "num_hidden_layers",
    "residual": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "context": "max_position_embeddings",
    "activation": "hidden_act",
    "epsilon": "rms_norm_eps",
}
_BERT_KEYS = {name: key for name, key in _KEYS.items() if name not in ("kv_heads", "head_size")}  # it has neither
_GPT2_KEYS = {
    "layers": "n_layer",
    "residual": "n_embd",
    "mlp": "n_inner",
    "heads": "n_head",
    "context": "n_positions",
    "activation": "activation_function",
    "epsilon": "layer_norm_epsilon",
}
_GEMMA2_KEYS = {**_KEYS, "activation": "hidden_activation"}
_DISTILBERT_KEYS = {
    "layers": "n_layers",
    "residual": "dim",
    "mlp": "hidden_dim",
    "heads": "n_heads",
    "context": "max_position_embeddings",
    "activation": "activation",
}
# What a config means where it leaves a key out.
_GPT2_DEFAULTS = {"tie_word_embeddings": True, "n_positions": 1024, "activation_function": "gelu_new"}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA2_DEFAULTS = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_BERT_DEFAULTS = {"hidden_act": "gelu", "type_vocab_size": 2}
_CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}  # Gemma 2's
# Activations by one name each; Gemma's first configs say "gelu", and mean the approximation.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# What transformers' modules call the sizes that they keep a second time, beside the config.
REMEMBERED = {
    "residual": ("hidden_size", "embed_dim", "dim"),
    "q": ("split_size", "all_head_size"),
    "heads": ("num_heads", "n_heads", "num_attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "groups": ("num_key_value_groups",),  # query heads of each key/value head
}
SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of blocks, in transformers' words


@dataclass(frozen=True)
class Stack:
    """Like blocks one behind the other: where they stand, how many, and the linears and stages of each."""

    blocks: str
    layers: int
    linears: Mapping[str, tuple[str, str]]
    stages: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of a model: (out, in) axis symbols per linear, stages, folds, norms and embedding."""

    model_type: str  # transformers' config.model_type
    linears: Mapping[str, tuple[str, str]]
    stages: tuple[tuple[str, ...], ...]
    folds: tuple[tuple[str, tuple[str, ...]], ...]
    block_norms: tuple[str, ...]  # norms that read the residual stream
    attention: str  # submodule of a block that returns its output and its attention weights
    closing: frozenset[str]  # linears whose product is the output of the submodule that holds them
    post_norms: Mapping[str, str] = field(default_factory=dict)  # closing linear → norm before the stream takes it
    sum_norms: Mapping[str, str] = field(default_factory=dict)  # closing linear → norm of its sum with the stream
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str | None = None  # a learned embedding of positions; None: rotary
    final_norm: str = "model.norm"
    head: str = "lm_head"
    centred: bool = False  # LayerNorm with a bias, else root-mean-square norms
    gain_offset: float = 0.0  # what a norm's weight is added to
    scaled_embedding: bool = False  # by the root of the width
    transposed: bool = False  # transformers keeps the blocks' linears as (in, out)
    sliding_period: int = 0  # every so many blocks one sees the whole context, the others a window; 0: all alike
    keys: Mapping[str, str] = field(default_factory=lambda: _KEYS)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: _ACTIVATIONS)
    refused: tuple[str, ...] = ()  # config entries that must not be set

    @property
    def norms(self) -> tuple[str, ...]:
        """Every norm of a block that is as wide as the residual stream."""
        return (*self.block_norms, *self.post_norms.values())

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The embeddings that are added up to the residual stream."""
        return (self.embedding, self.positions) if self.positions else (self.embedding,)

    @property
    def splits_width(self) -> bool:
        """Whether a head is as wide as the width divided by the number of heads, since configs cannot say otherwise."""
        return "head_size" not in self.keys

    def offset(self, tensor: str) -> float:
        """What is added to a tensor before a norm multiplies by it; 0 for all that is no norm's gain."""
        return self.gain_offset if tensor.endswith("norm.weight") else 0.0


_LLAMA_CLOSING = frozenset({"self_attn.o_proj", "mlp.down_proj"})


def _llama_like(model_type: str, **differences: Any) -> Architecture:
    norms = ("input_layernorm", "post_attention_layernorm")
    same = Architecture(model_type, _LLAMA_LINEARS, _LLAMA_STAGES, _LLAMA_FOLDS, norms, "self_attn", _LLAMA_CLOSING)
    return replace(same, **differences)


def _gemma_like(model_type: str, **differences: Any) -> Architecture:
    shared: dict[str, Any] = {"gain_offset": 1.0, "scaled_embedding": True, "refused": ("use_bidirectional_attention",)}
    return _llama_like(model_type, **shared, **differences)


_AROUND: dict[str, Any] = {  # Gemma 2's and 3's norms before and after each submodule
    "folds": _GEMMA2_FOLDS,
    "block_norms": ("input_layernorm", "pre_feedforward_layernorm"),
    "post_norms": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"},
    "keys": _GEMMA2_KEYS,
}
_GPT2 = Architecture(
    "gpt2",
    _GPT2_LINEARS,
    _GPT2_STAGES,
    _GPT2_FOLDS,
    ("ln_1", "ln_2"),
    "attn",
    frozenset({"attn.c_proj", "mlp.c_proj"}),
    blocks="transformer.h",
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    centred=True,
    transposed=True,
    keys=_GPT2_KEYS,
    defaults=_GPT2_DEFAULTS,
    refused=("add_cross_attention", "scale_attn_by_inverse_layer_idx"),
)
_ALL = (
    *(_llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3")),
    _llama_like("phi3", linears=_PHI3_LINEARS, stages=_PHI3_STAGES, folds=_PHI3_FOLDS),
    _gemma_like("gemma", defaults=_GEMMA_DEFAULTS, activations={**_ACTIVATIONS, "gelu": "gelu_tanh"}),
    _gemma_like("gemma2", **_AROUND, sliding_period=2, defaults={**_GEMMA2_DEFAULTS, **_CAPS}),
    _gemma_like("gemma3_text", **_AROUND, sliding_period=6, defaults=_GEMMA2_DEFAULTS),
    _GPT2,
)
ARCHITECTURES = {architecture.model_type: architecture for architecture in _ALL}
# The same bodies with a head for classes, which reads the final state of a text's last token.
CLASSIFYING_DECODERS = {
    name: replace(ARCHITECTURES[name], head="score") for name in ("llama", "mistral", "qwen2", "qwen3")
}


@dataclass(frozen=True)
class Encoder(Architecture):
    """Names of the parts of an encoder with a classification head, every norm behind its sum (post-norm).

    linears are listed as query, key, value, output, up, down. `embedding` and `final_norm` are those of the input; the
    head reads the first token's state through the linear `pooler` and `pooling`. outside: (out, in) symbols of the
    other matrices beside blocks and word embedding, positions among them.
    """

    types: str | None = None  # token type embedding, of which text without a pair sees the first row
    pooler: str = ""
    pooling: str = "Tanh"  # as ONNX calls it
    outside: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    padded_positions: bool = False  # positions count from pad_token_id + 1 on, and padding has none

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Those of words and positions, and that of types where there is one."""
        return (*super().embeddings, self.types) if self.types else super().embeddings


def _bert_like(model_type: str, pooler: str, head: str, **differences: Any) -> Encoder:
    attention, out, up, down = "attention.self", "attention.output.dense", "intermediate.dense", "output.dense"
    same = Encoder(
        model_type,
        linears={
            **{f"{attention}.{name}": ("q", "residual") for name in ("query", "key", "value")},
            out: ("residual", "q"),
            up: ("mlp", "residual"),
            down: ("residual", "mlp"),
        },
        stages=(tuple(f"{attention}.{name}" for name in ("query", "key", "value")), (out,), (up,), (down,)),
        folds=(),
        block_norms=("attention.output.LayerNorm", "output.LayerNorm"),
        attention=attention,
        closing=frozenset(),
        sum_norms={out: "attention.output.LayerNorm", down: "output.LayerNorm"},
        blocks=f"{model_type}.encoder.layer",
        embedding=f"{model_type}.embeddings.word_embeddings",
        positions=f"{model_type}.embeddings.position_embeddings",
        final_norm=f"{model_type}.embeddings.LayerNorm",
        head=head,
        centred=True,
        keys=_BERT_KEYS,
        defaults=_BERT_DEFAULTS,
        types=f"{model_type}.embeddings.token_type_embeddings",
        pooler=pooler,
        outside={
            f"{model_type}.embeddings.position_embeddings": ("positions", "residual"),
            f"{model_type}.embeddings.token_type_embeddings": ("types", "residual"),
            pooler: ("pooled", "residual"),
        },
    )
    return replace(same, **differences)


_DISTILBERT = Encoder(
    "distilbert",
    linears={
        **{f"attention.{name}": ("q", "residual") for name in ("q_lin", "k_lin", "v_lin")},
        "attention.out_lin": ("residual", "q"),
        "ffn.lin1": ("mlp", "residual"),
        "ffn.lin2": ("residual", "mlp"),
    },
    stages=(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        ("attention.out_lin",),
        ("ffn.lin1",),
        ("ffn.lin2",),
    ),
    folds=(),
    block_norms=("sa_layer_norm", "output_layer_norm"),
    attention="attention",
    closing=frozenset(),
    sum_norms={"attention.out_lin": "sa_layer_norm", "ffn.lin2": "output_layer_norm"},
    blocks="distilbert.transformer.layer",
    embedding="distilbert.embeddings.word_embeddings",
    positions="distilbert.embeddings.position_embeddings",
    final_norm="distilbert.embeddings.LayerNorm",
    head="classifier",
    centred=True,
    keys=_DISTILBERT_KEYS,
    defaults={"activation": "gelu"},
    pooler="pre_classifier",
    pooling="Relu",
    outside={
        "distilbert.embeddings.position_embeddings": ("positions", "residual"),
        "pre_classifier": ("pooled", "residual"),
    },
)
_ENCODERS = (
    _bert_like("bert", "bert.pooler.dense", "classifier"),
    _bert_like(
        "roberta",
        "classifier.dense",
        "classifier.out_proj",
        padded_positions=True,
        defaults={**_BERT_DEFAULTS, "pad_token_id": 1},
    ),
    _DISTILBERT,
)
ENCODERS = {encoder.model_type: encoder for encoder in _ENCODERS}


@dataclass(frozen=True)
class EncoderDecoder(Architecture):
    """Names of the parts of a model whose decoder reads, besides its own text, what an encoder has made of another.

    The fields of `Architecture` are the decoder's, `encoder_*` the encoder's; a norm stands before each sublayer. A
    half's first block holds the table of relative distances, which holds for all of its blocks.
    """

    encoder_blocks: str = "encoder.block"
    encoder_linears: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    encoder_stages: tuple[tuple[str, ...], ...] = ()
    encoder_norms: tuple[str, ...] = ()
    encoder_final_norm: str = "encoder.final_layer_norm"
    distances: str = "layer.0.SelfAttention.relative_attention_bias"  # of a first block: (buckets, heads)
    scaled_output: bool = False  # states by the root of the width before the head, unless the config says otherwise


def _t5_attention(name: str) -> dict[str, tuple[str, str]]:
    return {**{f"{name}.{part}": ("q", "residual") for part in "qkv"}, f"{name}.o": ("residual", "q")}


def _t5_mlp(name: str, gated: bool) -> dict[str, tuple[str, str]]:
    inner = ("wi_0", "wi_1") if gated else ("wi",)
    return {**{f"{name}.{part}": ("mlp", "residual") for part in inner}, f"{name}.wo": ("residual", "mlp")}


def _t5_stages(linears: Mapping[str, tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Linears that share an input; keys and values of cross attention read the encoder's states."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in linears:
        part, _, own = name.rpartition(".")
        crossing = part.endswith("EncDecAttention") and own in "kv"
        reads = {"o": "heads", "wo": "inner"}.get(own, "states" if crossing else "stream")
        found.setdefault((part, reads), []).append(name)
    return tuple(map(tuple, found.values()))


def _t5_like(model_type: str, gated: bool, **differences: Any) -> EncoderDecoder:
    reading = {**_t5_attention("layer.0.SelfAttention"), **_t5_mlp("layer.1.DenseReluDense", gated)}
    writing = {
        **_t5_attention("layer.0.SelfAttention"),
        **_t5_attention("layer.1.EncDecAttention"),
        **_t5_mlp("layer.2.DenseReluDense", gated),
    }
    return EncoderDecoder(
        model_type,
        linears=writing,
        stages=_t5_stages(writing),
        folds=(),
        block_norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
        attention="layer.0.SelfAttention",
        closing=frozenset(),
        blocks="decoder.block",
        embedding="shared",
        final_norm="decoder.final_layer_norm",
        keys=_T5_KEYS,
        defaults={**_T5_DEFAULTS, "feed_forward_proj": _T5_MLPS[model_type]},
        activations=_T5_ACTIVATIONS,
        encoder_linears=reading,
        encoder_stages=_t5_stages(reading),
        encoder_norms=("layer.0.layer_norm", "layer.1.layer_norm"),
        **differences,
    )


_T5_KEYS = {
    "layers": "num_decoder_layers",
    "encoder_layers": "num_layers",
    "residual": "d_model",
    "mlp": "d_ff",
    "heads": "num_heads",
    "head_size": "d_kv",
    "context": "n_positions",  # a convention of its configs: distances have no end
    "activation": "feed_forward_proj",
    "epsilon": "layer_norm_epsilon",
}
_T5_DEFAULTS = {
    "n_positions": 512,
    "tie_word_embeddings": True,
    "scale_attn_weights": False,
    "relative_attention_num_buckets": 32,
}
_T5_MLPS = {"t5": "relu", "mt5": "gated-gelu"}  # where a config says nothing
# transformers takes its tanh approximation for "gated-gelu" alone.
_T5_ACTIVATIONS = {
    "gated-gelu": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gated-gelu_new": "gelu_tanh",
    "gated-relu": "relu",
    "gated-silu": "silu",
}
SEQ2SEQ = {  # by whether the MLP is gated
    kind: {gated: _t5_like(kind, gated, scaled_output=kind == "t5") for gated in (False, True)} for kind in _T5_MLPS
}
