"""Per-architecture facts, as tables: which tensors exist, their shapes, and how channels connect them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
class Encoder(Architecture):
    """Names of the parts of an encoder with a classification head, every norm behind its sum (post-norm).

    linears are listed as query, key, value, output, up, down. `embedding` and `final_norm` are those of the input; the
    head reads the first token's state through the linear `pooler` and `pooling`. outside: (out, in) symbols of the
    other matrices beside blocks and word embedding. config: transformers' names of our config's entries, where others.
    """

    positions: str = ""  # position embedding
    types: str | None = None  # token type embedding, of which text without a pair sees the first row
    pooler: str = ""
    pooling: str = "Tanh"  # as ONNX calls it
    outside: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    padded_positions: bool = False  # positions count from pad_token_id + 1 on, and padding has none


def _bert_like(model_type: str, pooler: str, head: str, padded_positions: bool = False) -> Encoder:
    attention, out, up, down = "attention.self", "attention.output.dense", "intermediate.dense", "output.dense"
    return Encoder(
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
        blocks=f"{model_type}.encoder.layer",
        embedding=f"{model_type}.embeddings.word_embeddings",
        final_norm=f"{model_type}.embeddings.LayerNorm",
        head=head,
        positions=f"{model_type}.embeddings.position_embeddings",
        types=f"{model_type}.embeddings.token_type_embeddings",
        pooler=pooler,
        outside={
            f"{model_type}.embeddings.position_embeddings": ("positions", "residual"),
            f"{model_type}.embeddings.token_type_embeddings": ("types", "residual"),
            pooler: ("residual", "residual"),
        },
        padded_positions=padded_positions,
    )


def _distilbert() -> Encoder:
    parts = ("q_lin", "k_lin", "v_lin")
    return Encoder(
        "distilbert",
        linears={
            **{f"attention.{name}": ("q", "residual") for name in parts},
            "attention.out_lin": ("residual", "q"),
            "ffn.lin1": ("mlp", "residual"),
            "ffn.lin2": ("residual", "mlp"),
        },
        stages=(tuple(f"attention.{name}" for name in parts), ("attention.out_lin",), ("ffn.lin1",), ("ffn.lin2",)),
        folds=(),
        block_norms=("sa_layer_norm", "output_layer_norm"),
        attention="attention",
        closing=frozenset(),
        blocks="distilbert.transformer.layer",
        embedding="distilbert.embeddings.word_embeddings",
        final_norm="distilbert.embeddings.LayerNorm",
        head="classifier",
        positions="distilbert.embeddings.position_embeddings",
        pooler="pre_classifier",
        pooling="Relu",
        outside={
            "distilbert.embeddings.position_embeddings": ("positions", "residual"),
            "pre_classifier": ("residual", "residual"),
        },
        config={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
    )


ENCODERS = {
    "bert": _bert_like("bert", "bert.pooler.dense", "classifier"),
    "roberta": _bert_like("roberta", "classifier.dense", "classifier.out_proj", padded_positions=True),
    "distilbert": _distilbert(),
}


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
    labels: tuple[str, ...] = ()  # classes that a classification head tells apart; a language model has none

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Facts:
        """Facts of a transformers config (as a dict); raises RecipeError for an unknown architecture."""
        kind = config.get("model_type")
        if kind in ENCODERS or classifies(config):
            return _encoder_facts(config)
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
        """Tensor name → shape of every stored matrix: block linears, embeddings, and the head unless tied."""
        found = {f"{name}.weight": shape for name, shape in self.linears.items()}
        found[self.embedding_tensor] = (self.vocabulary, self.sizes["residual"])
        if isinstance(self.architecture, Encoder):
            outside = {**self.architecture.outside, self.architecture.head: ("labels", "residual")}
            return found | {f"{name}.weight": (self.sizes[n], self.sizes[m]) for name, (n, m) in outside.items()}
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


def classifies(config: Mapping[str, Any]) -> bool:
    """Whether a transformers config (as a dict) is that of a model with a classification head.

    >>> classifies({"architectures": ["BertForSequenceClassification"]}), classifies({"architectures": None})
    (True, False)
    """
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _encoder_facts(config: Mapping[str, Any]) -> Facts:
    """Facts of an encoder with a classification head; raises RecipeError for any other head or encoder."""
    kind = str(config.get("model_type"))
    if kind not in ENCODERS:
        raise RecipeError(f"a classifier of architecture {kind!r} is not supported; supported: {', '.join(ENCODERS)}")
    if not classifies(config):
        found = ", ".join(config.get("architectures") or ["no head"])
        raise RecipeError(f"{kind} is supported with a head for classes (…ForSequenceClassification), not as {found}")
    names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    labels = tuple(str(names[i]) for i in sorted(names, key=int))
    if len(labels) < 2 or config.get("problem_type") not in (None, "single_label_classification"):
        raise RecipeError(
            f"{kind}: a head for one of several classes is supported, and this one has {len(labels)} outputs for "
            f"{config.get('problem_type') or 'regression'}"
        )
    if config.get("is_decoder") or config.get("position_embedding_type", "absolute") != "absolute":
        raise RecipeError(f"{kind}: only encoders with absolute positions are supported")
    architecture = ENCODERS[kind]

    def entry(name: str) -> Any:
        return config[architecture.config.get(name, name)]

    skipped = config.get("pad_token_id", 1) + 1 if architecture.padded_positions else 0
    sizes = {
        "residual": entry("hidden_size"),
        "q": entry("hidden_size"),
        "mlp": entry("intermediate_size"),
        "positions": config["max_position_embeddings"],
        "types": config.get("type_vocab_size", 2),
        "labels": len(labels),
    }
    return Facts(
        architecture=architecture,
        layers=entry("num_hidden_layers"),
        sizes=sizes,
        heads=entry("num_attention_heads"),
        kv_heads=entry("num_attention_heads"),
        vocabulary=config["vocab_size"],
        context_length=config["max_position_embeddings"] - skipped,
        tied=False,
        activation=config.get(architecture.config.get("hidden_act", "hidden_act"), "gelu"),
        labels=labels,
    )


def _window(config: Mapping[str, Any]) -> int | None:
    window: int | None = config.get("sliding_window")
    narrow = window is not None and config.get("use_sliding_window") is not False
    return window if narrow and window < config["max_position_embeddings"] else None
