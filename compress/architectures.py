"""What is known of a model from its config alone, by the tables of `compress.families`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compress.errors import RecipeError
from compress.families import (
    ARCHITECTURES,
    CLASSIFYING_DECODERS,
    ENCODERS,
    FULL,
    SEQ2SEQ,
    SLIDING,
    STACKED,
    Architecture,
    Encoder,
    EncoderDecoder,
    Stack,
)


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
    labels: tuple[str, ...] = ()  # classes that a classification head tells apart; a language model has none
    encoder_layers: int = 0  # of a model that reads one text and writes another; `layers` are its decoder's then
    output_scale: float = 1.0  # of the states that the head reads

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Facts:
        """Facts of a transformers config (as a dict).

        Raises RecipeError for an unknown architecture, and for a variant of one that is not supported.
        """
        arch = _architecture(config)
        config = {**arch.defaults, **config}
        keys = arch.keys
        residual, heads, context = (config[keys[entry]] for entry in ("residual", "heads", "context"))
        head_size = config.get(keys.get("head_size", "")) or residual // heads
        kv_heads = config.get(keys.get("kv_heads", "")) or heads
        sizes = {
            "residual": residual,
            "q": heads * head_size,
            "kv": kv_heads * head_size,
            "mlp": config.get(keys["mlp"]) or 4 * residual,  # GPT-2 leaves it out
        }
        labels = _labels(config) if classifies(config) else ()
        if isinstance(arch, EncoderDecoder):
            sizes["distances"] = config["relative_attention_num_buckets"]
        if isinstance(arch, Encoder):
            sizes |= {"positions": context, "types": config.get("type_vocab_size", 0), "labels": len(labels)}
            sizes["pooled"] = residual
            if arch.padded_positions:
                if config["pad_token_id"] is None:
                    raise RecipeError(f"{arch.model_type} counts positions from pad_token_id on, which is null; set it")
                context -= config["pad_token_id"] + 1
        activation = config.get(keys["activation"]) or "silu"
        layers, encoder_layers = config.get(keys["layers"]), 0
        if isinstance(arch, EncoderDecoder):
            encoder_layers = config[keys["encoder_layers"]]
            context *= 2  # that of the source, and that of the target
        return Facts(
            architecture=arch,
            layers=encoder_layers if layers is None else layers,
            sizes=sizes,
            heads=heads,
            kv_heads=kv_heads,
            vocabulary=config["vocab_size"],
            context_length=context,
            tied=bool(config.get("tie_word_embeddings", False)) and not labels,  # a head for classes never is
            activation=arch.activations.get(activation, activation),
            rope=_rope(config),
            window=_window(config, context),
            kinds=_kinds(config, arch, config[keys["layers"]]),
            query_scale=_query_scale(config, head_size),
            attention_cap=config.get("attn_logit_softcapping") if arch.model_type == "gemma2" else None,
            logit_cap=config.get("final_logit_softcapping"),
            labels=labels,
            encoder_layers=encoder_layers,
            output_scale=_output_scale(config, arch),
        )

    def size(self, axis: str) -> int:
        """Channels of an axis, stacked or not."""
        return sum(self.sizes[part] for part in STACKED.get(axis, (axis,)))

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.sizes["q"] // self.heads

    @property
    def embedding_tensor(self) -> str:
        """Tensor name of the token embedding (also the output head, where tied)."""
        return f"{self.architecture.embedding}.weight"

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name → (out_features, in_features) of every linear inside the blocks."""
        return {
            f"{stack.blocks}.{i}.{name}": (self.size(out), self.size(inn))
            for stack in self.stacks
            for i in range(stack.layers)
            for name, (out, inn) in stack.linears.items()
        }

    def inputs(self, *axes: str) -> dict[str, int]:
        """First linear of each stage of a block, as the first block calls it → its input channels. axes: only these."""
        stack = self.stacks[-1]
        firsts = {stage[0]: stack.linears[stage[0]][1] for stage in stack.stages}
        return {
            f"{stack.blocks}.0.{name}": self.size(axis)
            for name, axis in firsts.items()
            if axis in (axes or firsts.values())
        }

    def inputs_of(self, tensors: Collection[str]) -> dict[str, int]:
        """`inputs`, but of the stages alone to which, in any block, one of these tensors belongs."""
        return {
            f"{stack.blocks}.0.{stage[0]}": self.size(stack.linears[stage[0]][1])
            for stack in self.stacks
            for stage in stack.stages
            if any(f"{stack.blocks}.{i}.{name}.weight" in tensors for i in range(stack.layers) for name in stage)
        }

    @property
    def paired(self) -> bool:
        """Whether the model reads one text and writes another: see `compress.pairs`."""
        return isinstance(self.architecture, EncoderDecoder)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks, in the order of computation: of an encoder-decoder the encoder's, then the decoder's."""
        arch = self.architecture
        own = Stack(arch.blocks, self.layers, arch.linears, arch.stages)
        if isinstance(arch, EncoderDecoder):
            return Stack(arch.encoder_blocks, self.encoder_layers, arch.encoder_linears, arch.encoder_stages), own
        return (own,)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Tensor name → shape of every matrix that steps may store: block linears, embeddings, head unless tied."""
        found = {f"{name}.weight": shape for name, shape in self.linears.items()}
        found[self.embedding_tensor] = (self.vocabulary, self.sizes["residual"])
        if isinstance(self.architecture, Encoder):
            outside = {**self.architecture.outside, self.architecture.head: ("labels", "pooled")}
            return found | {f"{name}.weight": (self.sizes[n], self.sizes[m]) for name, (n, m) in outside.items()}
        if not self.tied:
            found[f"{self.architecture.head}.weight"] = (len(self.labels) or self.vocabulary, self.sizes["residual"])
        return found

    @property
    def floats(self) -> int:
        """Numbers that stay floats: norms, a decoder's learned positions, and the biases that go with centred norms."""
        arch, width = self.architecture, self.sizes["residual"]
        found = (self.layers * len(arch.norms) + 1) * width * (2 if arch.centred else 1)
        if arch.centred:
            found += sum(n for n, _ in self.linears.values())
        if isinstance(arch, EncoderDecoder):
            found += (self.encoder_layers * len(arch.encoder_norms) + 1) * width
            found += 2 * self.sizes["distances"] * self.heads  # a bias of either half
        if isinstance(arch, Encoder):
            found += self.sizes["pooled"] + len(self.labels)  # biases of pooler and head
        elif arch.positions is not None:
            found += self.context_length * width
        return found

    @property
    def refuses_streaming(self) -> str | None:
        """What `streaming` does that rules this model out, as the rest of a sentence; None where it works."""
        kind = self.architecture.model_type
        if self.labels:
            return f"is for language models, and {kind} here tells classes apart"
        if self.paired:
            return f"is for language models, and {kind} reads one text and writes another"
        if self.architecture.transposed:
            return f"reads no transposed linears, which {kind} has"
        return None

    def axes(self, linear: str) -> tuple[tuple[str, ...], str]:
        """The output axes that a linear of a block, by its name there, stacks, and its input axis."""
        out, inn = self.architecture.linears[linear]
        return STACKED.get(out, (out,)), inn

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

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Norm → linears that read the residual stream behind it, by full names, in the order of computation.

        Not for an encoder-decoder, which has two stacks of blocks.
        """
        assert not self.paired
        arch = self.architecture
        blocks = [f"{arch.blocks}.{i}" for i in range(self.layers)]
        norms = [f"{block}.{norm}" for block in blocks for norm in arch.block_norms]
        reading = [stage for stage in arch.stages if arch.linears[stage[0]][1] == "residual"]
        stages = [tuple(f"{block}.{name}" for name in stage) for block in blocks for stage in reading]
        if isinstance(arch, Encoder):  # each norm stands behind a sum
            return dict(zip([arch.final_norm, *norms], [*stages, (arch.pooler,)], strict=True))
        return dict(zip([*norms, arch.final_norm], [*stages, (arch.head,)], strict=True))

    @property
    def parameters(self) -> int:
        """Number of weights in the matrices (norms, biases and positions, under 1 %, left out)."""
        return sum(n * m for n, m in self.matrices.values())


def classifies(config: Mapping[str, Any]) -> bool:
    """Whether a transformers config (as a dict) is that of a model with a classification head.

    >>> classifies({"architectures": ["BertForSequenceClassification"]}), classifies({"architectures": None})
    (True, False)
    """
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _architecture(config: Mapping[str, Any]) -> Architecture:
    """The table of a config's architecture; raises RecipeError for one that is not supported, or not with its head."""
    kind = config.get("model_type")
    if classifies(config) and kind in CLASSIFYING_DECODERS:
        if config.get("pad_token_id") is None:
            raise RecipeError(f"{kind} finds a text's last token by pad_token_id, which is null; set it")
        return CLASSIFYING_DECODERS[kind]
    if classifies(config) and kind not in ENCODERS:
        known = ", ".join((*ENCODERS, *CLASSIFYING_DECODERS))
        raise RecipeError(f"a classifier of architecture {kind!r} is not supported; supported: {known}")
    if kind in SEQ2SEQ:
        return _encoder_decoder(kind, config)
    if kind in ENCODERS:
        if not classifies(config):
            found = ", ".join(config.get("architectures") or ["no head"])
            raise RecipeError(
                f"{kind} is supported with a head for classes (…ForSequenceClassification), not as {found}"
            )
        if config.get("is_decoder") or config.get("position_embedding_type", "absolute") != "absolute":
            raise RecipeError(f"{kind}: only encoders with absolute positions are supported")
        return ENCODERS[kind]
    if kind not in ARCHITECTURES and config.get("is_encoder_decoder"):
        raise RecipeError(
            f"architecture {kind!r} is not supported: it reads a source and writes a target, and of such models "
            f"{' and '.join(SEQ2SEQ)} are; use one of them"
        )
    if kind not in ARCHITECTURES:
        raise RecipeError(f"architecture {kind!r} is not supported; supported: {', '.join([*ARCHITECTURES, *SEQ2SEQ])}")
    arch = ARCHITECTURES[kind]
    if odd := next((key for key in arch.refused if config.get(key)), None):
        raise RecipeError(f"architecture {kind!r} is not supported with {odd}={config[odd]!r}; unset it")
    return arch


def _encoder_decoder(kind: str, config: Mapping[str, Any]) -> Architecture:
    """The table of T5 or one like it; raises RecipeError for half of one, or another head."""
    found = config.get("architectures") or ["no head"]
    if not any(str(name).endswith("ForConditionalGeneration") for name in found):
        raise RecipeError(f"{kind} is supported as …ForConditionalGeneration, not as {', '.join(found)}")
    plain = SEQ2SEQ[kind][False]
    mlp = str(config.get("feed_forward_proj") or plain.defaults["feed_forward_proj"])
    return SEQ2SEQ[kind][mlp.startswith("gated-")]


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of a classification head in its order; raises RecipeError for another kind of head."""
    names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    labels = tuple(str(names[i]) for i in sorted(names, key=int))
    if len(labels) < 2 or config.get("problem_type") not in (None, "single_label_classification"):
        raise RecipeError(
            f"{config['model_type']}: a head for one of several classes is supported, and this one has {len(labels)} "
            f"outputs for {config.get('problem_type') or 'regression'}"
        )
    return labels


def _output_scale(config: Mapping[str, Any], arch: Architecture) -> float:
    """Of a T5: once tied to its embedding, its head read states scaled down; newer configs say so themselves."""
    if not isinstance(arch, EncoderDecoder) or not arch.scaled_output:
        return 1.0
    scaled = config.get("scale_decoder_outputs", config["tie_word_embeddings"] is not False)
    return float(config[arch.keys["residual"]] ** -0.5) if scaled else 1.0


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
