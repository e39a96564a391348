"""Random two-layer models with a byte-level tokenizer, and documents for them: real code, small sizes."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compress.interfaces import Documents
from compress.model import Model

TIED = ("gpt2", "gemma", "gemma2", "gemma3_text")  # architectures that share the embedding with the head
WORDS = "the a model weight scale token group loss margin proof small large is was has of and in to".split()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: a byte-level BPE without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_model(seed: int = 0, **options: int) -> Model:
    """A random Llama of two layers over 256 byte tokens, with a context of 128. options: of its config."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Model(LlamaForCausalLM(LlamaConfig(**{**fields, **options})), byte_tokenizer())


def perturbed(model: Model, noise: float, seed: int = 1) -> Model:
    """A copy whose output head has relative Gaussian noise."""
    twin = Model(copy.deepcopy(model.module), model.tokenizer)
    with torch.no_grad():
        weight = twin.parameter("lm_head.weight")
        generator = torch.Generator().manual_seed(seed)
        weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * noise)
    twin.touch()
    return twin


def documents(count: int, seed: int = 0, source: str = "words", length: int = 64) -> Documents:
    """Random sentences of 3 to 20 words."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(count)]
    return Documents(source, [(f"{source}-{i}", t) for i, t in enumerate(texts)], f"{source}{seed}", length)


def tiny_module(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random transformers model of an architecture, with norms and biases that matter and a narrow window, if any.

    Heads are not as wide as the width divided by their number, where the architecture has a say in it.
    """
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    shape |= {"vocab_size": 256, "initializer_range": 0.3, "tie_word_embeddings": kind in TIED}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind == "gpt2":
        own: dict[str, Any] = {"n_inner": 64}
    else:
        own = {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16}
    # llama.cpp wants all heads of these together to be as wide as the hidden state.
    if kind == "phi3":
        own["head_dim"] = 8
    if kind == "qwen2":
        own |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if kind in ("gemma2", "gemma3_text"):
        own |= {"sliding_window": 16, "query_pre_attn_scalar": 16}
    if kind == "gemma2":  # other caps than its config's and llama.cpp's own
        own |= {"final_logit_softcapping": 9.0, "attn_logit_softcapping": 20.0}
    if kind == "gemma3_text":
        own["num_hidden_layers"] = 6  # the last of which has no window
    config = AutoConfig.for_model(kind, **{**shape, **ends, **own, **options})
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def tiny_of(kind: str, seed: int = 0, **options: Any) -> Model:
    """`tiny_module` with the byte-level tokenizer."""
    return Model(tiny_module(kind, seed, **options), byte_tokenizer())
