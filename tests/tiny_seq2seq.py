"""Small encoder-decoders of every kind that is supported, a tokenizer trained for them, and pairs to read and write."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration, T5Tokenizer

from compress.seq2seq import Seq2Seq, settle_head
from tests.tiny import WORDS

KINDS = ("t5", "t5 v1.1", "mt5")
SPECIAL = ["<pad>", "</s>", "<unk>"]


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of 3 to 9 words, and the same words backwards: {id, source, target}."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        rows.append({"id": f"p{seed}-{i}", "source": " ".join(words), "target": " ".join(reversed(words))})
    return rows


@cache
def _vocabulary() -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([row["source"] for row in sentences(200, seed=9)], trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def tokenizer() -> T5Tokenizer:
    """T5's own class over a small vocabulary: padding is 0, and 1 ends every text."""
    return T5Tokenizer(vocab=list(_vocabulary()), extra_ids=0)


def tiny_seq2seq(kind: str = "t5", seed: int = 0, **options: Any) -> Seq2Seq:
    """Two random blocks read, three write, 32 wide; 48 tokens a side, distances of 20 and more alike.

    "t5" shares its embedding with the head; "t5 v1.1" has a head of its own and a gated MLP, "mt5" the MLP alone.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    shape: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    shape |= {"num_decoder_layers": 3, "vocab_size": len(words) + 3, "n_positions": 48}
    shape |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}
    if kind == "mt5":
        module: Any = MT5ForConditionalGeneration(MT5Config(**{**shape, **options}))
    else:
        own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if kind == "t5 v1.1" else {}
        module = T5ForConditionalGeneration(T5Config(**{**shape, **own, **options}))
    with torch.no_grad():
        settle_head(module, tied=kind != "t5 v1.1")
        if kind == "t5 v1.1":
            module.lm_head.weight.copy_(torch.randn_like(module.lm_head.weight) * 0.3)
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.shape == (8, 4):  # biases of distances, which else are too small to matter
                parameter.mul_(4)
    return Seq2Seq(module, words, name=f"tiny-{kind}")


def saved(model: Seq2Seq, folder: Path) -> Path:
    """A folder as it is published: what the head shares is said in config.json, which transformers 5 overrules."""
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = model.facts.tied
    config.pop("scale_decoder_outputs", None)  # older than it
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_pairs(path: Path, rows: list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
