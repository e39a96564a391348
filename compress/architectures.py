"""Per-architecture facts, as tables: which tensors exist, their shapes, and how channels connect them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import RecipeError

# Sizes of a tensor's axes, by symbol; `Facts` computes them from a config.
# residual: the hidden state. q, kv: query and key/value heads times head size. mlp: the MLP's inner width.
_LLAMA_LINEARS = {
    "self_attn.q_proj": ("q", "residual"),
    "self_attn.k_proj": ("kv", "residual"),
    "self_attn.v_proj": ("kv", "residual"),
    "self_attn.o_proj": ("residual", "q"),
    "mlp.gate_proj": ("mlp", "residual"),
    "mlp.up_proj": ("mlp", "residual"),
    "mlp.down_proj": ("residual", "mlp"),
}
# Linears of a block that read the same activation, in the order in which a block computes them.
_LLAMA_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# A module and the linears that read its output channels as they are, or multiplied by others: dividing a channel
# of the one (a norm's gain, a linear's row) and multiplying the columns of the others changes no function.
_LLAMA_FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of a decoder: (out, in) axis symbols per linear, stages, folds, norms and embedding."""

    model_type: str  # transformers' config.model_type
    linears: Mapping[str, tuple[str, str]]
    stages: tuple[tuple[str, ...], ...]
    folds: tuple[tuple[str, tuple[str, ...]], ...]
    block_norms: tuple[str, ...]  # norms over the residual stream
    attention: str  # submodule of a block that returns its output and its attention weights
    closing: frozenset[str]  # linears whose product is the output of the submodule that holds them
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"


def _llama_like(model_type: str) -> Architecture:
    norms = ("input_layernorm", "post_attention_layernorm")
    closing = frozenset({"self_attn.o_proj", "mlp.down_proj"})
    return Architecture(model_type, _LLAMA_LINEARS, _LLAMA_STAGES, _LLAMA_FOLDS, norms, "self_attn", closing)


ARCHITECTURES = {name: _llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3")}


@dataclass(frozen=True)
class Facts:
    """What is known of a model from its config alone, before any weight is read."""

    architecture: Architecture
    layers: int
    sizes: Mapping[str, int]  # axis symbol → size
    heads: int
    kv_heads: int
    vocabulary: int
    context_length: int
    tied: bool
    activation: str = "silu"  # of the MLP
    rope: str = "default"  # how rotary frequencies are scaled
    window: int | None = None  # tokens that attention reaches back to, where that is less than the context

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Facts:
        """Facts of a transformers config (as a dict); raises RecipeError for an unknown architecture."""
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise RecipeError(f"architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        sizes = {
            "residual": config["hidden_size"],
            "q": heads * head_size,
            "kv": kv_heads * head_size,
            "mlp": config["intermediate_size"],
        }
        return Facts(
            architecture=ARCHITECTURES[kind],
            layers=config["num_hidden_layers"],
            sizes=sizes,
            heads=heads,
            kv_heads=kv_heads,
            vocabulary=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            tied=bool(config.get("tie_word_embeddings", False)),
            activation=config.get("hidden_act") or "silu",
            rope=(config.get("rope_parameters") or {}).get("rope_type") or "default",
            window=_window(config),
        )

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
            f"{self.architecture.blocks}.{i}.{name}": (self.sizes[out], self.sizes[inn])
            for i in range(self.layers)
            for name, (out, inn) in self.architecture.linears.items()
        }

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Tensor name → shape of every stored matrix: block linears, embedding, and the head unless tied."""
        found = {f"{name}.weight": shape for name, shape in self.linears.items()}
        found[self.embedding_tensor] = (self.vocabulary, self.sizes["residual"])
        if not self.tied:
            found[f"{self.architecture.head}.weight"] = (self.vocabulary, self.sizes["residual"])
        return found

    def folds(self, block: int) -> list[tuple[str, tuple[str, ...]]]:
        """Modules of a block with the linears that a factor per channel can be moved to, by full names.

        Left out where a channel is read more than once, as value channels are by grouped queries.
        """
        prefix = f"{self.architecture.blocks}.{block}"
        found = []
        for source, readers in self.architecture.folds:
            out, inn = self.architecture.linears.get(source, ("residual",))[0], self.architecture.linears[readers[0]][1]
            if self.sizes[out] == self.sizes[inn]:
                found.append((f"{prefix}.{source}", tuple(f"{prefix}.{name}" for name in readers)))
        return found

    @property
    def parameters(self) -> int:
        """Number of weights in the matrices (norms and biases, under 0.1 %, left out)."""
        return sum(n * m for n, m in self.matrices.values())


def _window(config: Mapping[str, Any]) -> int | None:
    window: int | None = config.get("sliding_window")
    narrow = window is not None and config.get("use_sliding_window") is not False
    return window if narrow and window < config["max_position_embeddings"] else None
