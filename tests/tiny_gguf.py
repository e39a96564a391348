"""Random two-layer models that llama.cpp runs, with a trained tokenizer, and what their files hold and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compress.encodings import EncodedTensor, Encoding, same_stored
from compress.model import Model
from compress.steps.quantize._fields import round_to_nearest
from export import _gguf_vocabulary
from export.gguf import Gguf

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


PRE_TOKENIZERS = {
    "gpt-2": byte_level(),
    "smollm": pre_tokenizers.Sequence([DIGITS, byte_level()]),
    "qwen2": Qwen2Tokenizer().backend_tokenizer.pre_tokenizer,
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"), byte_level(use_regex=False)]
    ),
}


def trained_tokenizer(pre: str = "smollm", **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,000 tokens, trained on the texts that tokenizers disagree about."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    # This file's own text gives merges enough; a file of tests would change the vocabulary with each test.
    tokenizer.train_from_iterator([*_gguf_vocabulary._PIECES, Path(__file__).read_text()] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **options)


def tiny(kind: str = "llama", tokenizer: Any = None, tied: bool = False, seed: int = 0, **options: Any) -> Model:
    """A random model of two layers whose attention matters: its weights and biases are large."""
    tokenizer = tokenizer or trained_tokenizer()
    config_class, model_class = MODELS[kind]
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if kind == "qwen3" else 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
    }
    config = config_class(
        vocab_size=len(tokenizer) + 5,  # rows that no token uses
        tie_word_embeddings=tied,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **{**shape, **options},
    )
    torch.manual_seed(seed)
    model = Model(model_class(config), tokenizer)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if parameter.dim() == 1:
                base = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(base + 0.3 * torch.randn(parameter.shape))
    return model


def encode_rtn(W: Tensor, encoding: Encoding) -> EncodedTensor:
    """Round to nearest: enough to fill every code."""
    if not encoding.is_coded:
        return EncodedTensor(encoding, W.to(torch.float16 if encoding.name == "fp16" else torch.bfloat16))
    if encoding.is_codebook:
        return round_to_nearest("W", W, encoding, search=False)
    low, high = encoding.code_range
    blocks = W.view(W.shape[0], encoding.groups(W.shape[1]), -1)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scales = (extreme / low).half()
    codes = (blocks / scales.float()).round().clamp(low, high)
    return EncodedTensor(encoding, codes.to(torch.int8).view(W.shape), scales.squeeze(2))


def encoded(model: Model, *encodings: Encoding) -> Model:
    """Store the matrices in the given encodings, in turn."""
    for i, name in enumerate(model.facts.matrices):
        W = model.parameter(name).detach().clone()
        model.store(name, encode_rtn(W, encodings[i % len(encodings)]))
    return model


def differing(model: Model, path: Path) -> set[str]:
    """Tensors that the file does not hold exactly, or does not hold at all."""
    read = dict(Gguf().stored(path))
    wanted = dict(model.tensors())
    wrong = set(wanted) ^ set(read)
    for name in set(wanted) & set(read):
        a, b = wanted[name], read[name]
        if isinstance(a, EncodedTensor):
            same = isinstance(b, EncodedTensor) and same_stored(a, b)
        else:
            same = isinstance(b, Tensor) and a.numpy().tobytes() == b.numpy().tobytes()
        if not same:
            wrong.add(name)
    return wrong


def kl(p: Tensor, q: Tensor) -> float:
    """Mean divergence in nats per token."""
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def windows(model: Model, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, model.vocabulary_size, (n,), generator=generator).tolist() for n in lengths]
