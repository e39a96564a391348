"""Per-architecture facts, as tables: which tensors exist, their shapes, and how channels connect them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from compress.errors import RecipeError

# Sizes of a tensor's axes, by symbol; `Facts` computes them from a config.
# residual: the hidden state. q, kv: query and key/value heads times head size. mlp: the MLP's inner width.
# qkv and gate_up are stacked: several axes in one, in the order in which the fused linear holds them.
_STACKED = {"qkv": ("q", "kv", "kv"), "gate_up": ("mlp", "mlp")}
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
_CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}  # Gemma 2's
# Activations by one name each; Gemma's first configs say "gelu", and mean the approximation.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of blocks, in transformers' words


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of a decoder: (out, in) axis symbols per linear, stages, folds, norms and embedding."""

    model_type: str  # transformers' config.model_type
    linears: Mapping[str, tuple[str, str]]
    stages: tuple[tuple[str, ...], ...]
    folds: tuple[tuple[str, tuple[str, ...]], ...]
    block_norms: tuple[str, ...]  # norms that read the residual stream
    attention: str  # submodule of a block that returns its output and its attention weights
    closing: frozenset[str]  # linears whose product is the output of the submodule that holds them
    post_norms: Mapping[str, str] = field(default_factory=dict)  # closing linear → norm before the stream takes it
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


@dataclass(frozen=True)
class Facts:
    """What is known of a model from its config alone, before any weight is read."""

    architecture: Architecture
    layers: int
    sizes: Mapping[str, int]  # axis symbol → size; stacked axes are left out
    heads: int
    kv_heads: int
    vocabulary: int
    context_length: int
    tied: bool
    activation: str = "silu"  # of the MLP
    rope: str = "default"  # how rotary frequencies are scaled
    window: int | None = None  # tokens that attention reaches back to, where that is less than the context
    kinds: tuple[str, ...] | None = ()  # of the blocks, where they differ; None: not known until blocks are removed
    query_scale: float = 0.0  # what products of queries and keys are multiplied by
    attention_cap: float | None = None  # c of c · tanh(x / c), for these products
    logit_cap: float | None = None  # the same for the logits

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Facts:
        """Facts of a transformers config (as a dict).

        Raises RecipeError for an unknown architecture, and for a variant of one that is not supported.
        """
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise RecipeError(f"architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        arch = ARCHITECTURES[kind]
        if odd := next((key for key in arch.refused if config.get(key)), None):
            raise RecipeError(f"architecture {kind!r} is not supported with {odd}={config[odd]!r}; unset it")
        config = {**arch.defaults, **config}
        keys = arch.keys
        residual, heads = config[keys["residual"]], config[keys["heads"]]
        head_size = config.get(keys.get("head_size", "")) or residual // heads
        kv_heads = config.get(keys.get("kv_heads", "")) or heads
        sizes = {
            "residual": residual,
            "q": heads * head_size,
            "kv": kv_heads * head_size,
            "mlp": config.get(keys["mlp"]) or 4 * residual,  # GPT-2 leaves it out
        }
        activation = config.get(keys["activation"]) or "silu"
        return Facts(
            architecture=arch,
            layers=config[keys["layers"]],
            sizes=sizes,
            heads=heads,
            kv_heads=kv_heads,
            vocabulary=config["vocab_size"],
            context_length=config[keys["context"]],
            tied=bool(config.get("tie_word_embeddings", False)),
            activation=arch.activations.get(activation, activation),
            rope=_rope(config),
            window=_window(config, config[keys["context"]]),
            kinds=_kinds(config, arch, config[keys["layers"]]),
            query_scale=_query_scale(config, head_size),
            attention_cap=config.get("attn_logit_softcapping") if kind == "gemma2" else None,
            logit_cap=config.get("final_logit_softcapping"),
        )

    def size(self, axis: str) -> int:
        """Channels of an axis, stacked or not."""
        return sum(self.sizes[part] for part in _STACKED.get(axis, (axis,)))

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.sizes["q"] // self.heads

    @property
    def embedding_tensor(self) -> str:
        """Tensor name of the token embedding (also the output head, where tied)."""
        return f"{self.architecture.embedding}.weight"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name → (out_features, in_features) of every linear inside the blocks."""
        return {
            f"{self.architecture.blocks}.{i}.{name}": (self.size(out), self.size(inn))
            for i in range(self.layers)
            for name, (out, inn) in self.architecture.linears.items()
        }

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Tensor name → shape of every matrix that steps may store: block linears, embedding, head unless tied."""
        found = {f"{name}.weight": shape for name, shape in self.linears.items()}
        found[self.embedding_tensor] = (self.vocabulary, self.sizes["residual"])
        if not self.tied:
            found[f"{self.architecture.head}.weight"] = (self.vocabulary, self.sizes["residual"])
        return found

    @property
    def floats(self) -> int:
        """Numbers that stay floats: norms, positions, and the biases that go with centred norms."""
        arch, width = self.architecture, self.sizes["residual"]
        found = (self.layers * len(arch.norms) + 1) * width * (2 if arch.centred else 1)
        if arch.positions is not None:
            found += self.context_length * width
        if arch.centred:
            found += sum(n for n, _ in self.linears.values())
        return found

    def axes(self, linear: str) -> tuple[tuple[str, ...], str]:
        """The output axes that a linear of a block, by its name there, stacks, and its input axis."""
        out, inn = self.architecture.linears[linear]
        return _STACKED.get(out, (out,)), inn

    def folds(self, block: int) -> list[tuple[str, tuple[str, ...]]]:
        """Modules of a block with the linears that a factor per channel can be moved to, by full names.

        Left out where a channel is read more than once, as value channels are by grouped queries.
        """
        prefix = f"{self.architecture.blocks}.{block}"
        found = []
        for source, readers in self.architecture.folds:
            out = self.axes(source)[0][-1] if source in self.architecture.linears else "residual"
            if self.sizes[out] == self.sizes[self.axes(readers[0])[1]]:
                found.append((f"{prefix}.{source}", tuple(f"{prefix}.{name}" for name in readers)))
        return found

    @property
    def parameters(self) -> int:
        """Number of weights in the matrices (norms, biases and positions, under 1 %, left out)."""
        return sum(n * m for n, m in self.matrices.values())


def _rope(config: Mapping[str, Any]) -> str:
    """The scaling of rotary frequencies: that of any kind of block which has another than the default."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    found = [str(p.get("rope_type") or p.get("type") or "default") for p in parts]
    return next((kind for kind in found if kind != "default"), "default")


def _window(config: Mapping[str, Any], context: int) -> int | None:
    window: int | None = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    return window if window < context else None


def _kinds(config: Mapping[str, Any], arch: Architecture, layers: int) -> tuple[str, ...]:
    period = config.get("sliding_window_pattern") or arch.sliding_period
    if not arch.sliding_period:
        return ()
    return tuple(config.get("layer_types") or [SLIDING if (i + 1) % period else FULL for i in range(layers)])


def _query_scale(config: Mapping[str, Any], head_size: int) -> float:
    if config.get("scale_attn_weights") is False:  # GPT-2's
        return 1.0
    return 1 / math.sqrt(config.get("query_pre_attn_scalar") or head_size)
