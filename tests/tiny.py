"""Random two-layer models with a byte-level tokenizer, and documents for them: real code, small sizes."""

from __future__ import annotations

import copy
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.interfaces import Documents
from compress.model import Model

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
