"""Random two-layer models that every runtime of ONNX takes, encoded by plain rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compress.encodings import FLOAT_DTYPES, EncodedTensor, Encoding
from compress.model import Model
from tests.tiny import byte_tokenizer

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
WINDOWS = [[3, 77, 201], list(range(40, 90)), [9], [250, 3, 3, 17, 101, 64, 5]]


def tiny(family: str, tied: bool, hidden: int = 64) -> Model:
    """A random model of two layers with grouped-query attention and, in Qwen2, biases (zeros in k_proj)."""
    torch.manual_seed(4)
    config, architecture = FAMILIES[family]
    module = architecture(
        config(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=hidden + 64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=[1, 2],
        )
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or name.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Model(module, byte_tokenizer())


def rounded(W: Tensor, encoding: Encoding) -> EncodedTensor:
    """Plain rounding of a matrix, with scales of both signs, for codes that are worth carrying."""
    if not encoding.is_affine:
        return EncodedTensor(encoding, W.to(getattr(torch, FLOAT_DTYPES[encoding.name])))
    low, high = encoding.code_range
    grouped = W.view(len(W), encoding.groups(W.shape[1]), -1)
    zero = torch.zeros(())
    if encoding.symmetric:
        sign = torch.where(grouped[..., :1] < 0, -1.0, 1.0)
        scales = (grouped.abs().amax(-1, keepdim=True) / -low * sign).half()
    else:
        smallest, largest = grouped.amin(-1, True).clamp(max=0), grouped.amax(-1, True).clamp(min=0)
        scales = ((largest - smallest) / high).half()
        zero = (-smallest / scales.float()).round().clamp(low, high)
    codes = ((grouped / scales.float()).round() + zero).clamp(low, high).view(W.shape)
    if encoding.symmetric:
        return EncodedTensor(encoding, codes.to(torch.int8), scales[..., 0])
    return EncodedTensor(encoding, codes.to(torch.uint8), scales[..., 0], zero[..., 0].to(torch.uint8))


def encode(model: Model, choose: Callable[[str], Encoding | None]) -> Model:
    for name in model.facts.matrices:
        if (encoding := choose(name)) is not None:
            model.store(name, rounded(model.parameter(name).detach(), encoding))
    return model


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL in nats per token, in float64 so that a difference of rounding errors is not its result."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
