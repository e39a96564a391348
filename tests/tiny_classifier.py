"""Small encoders with a classification head, of every kind that is supported, and a task that one of them learns."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from compress.classifier import Classifier
from tests.tiny import WORDS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("bert", "roberta", "distilbert")
GOOD, BAD = WORDS[1:6], WORDS[6:11]  # a text has one word of either, which says its class
NAMES = ("bad", "good", "mixed")


def tokenizer() -> BertTokenizer:
    """One token per word."""
    return BertTokenizer(vocab={word: i for i, word in enumerate((*SPECIAL, *WORDS))})


def tiny_classifier(kind: str = "bert", classes: int = 3, seed: int = 0, **options: Any) -> Classifier:
    """Two random blocks, 32 wide, over the words of `tests.tiny`; a context of 48. options: of its config."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 48}
    shape |= {"id2label": dict(enumerate(NAMES[:classes])), "label2id": {n: i for i, n in enumerate(NAMES[:classes])}}
    shape |= {"initializer_range": 0.3, "pad_token_id": 0, **options}
    wide: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    module: Any
    if kind == "bert":
        module = BertForSequenceClassification(BertConfig(**{**wide, "intermediate_size": 64, **shape}))
    elif kind == "roberta":
        shape["max_position_embeddings"] += 1
        module = RobertaForSequenceClassification(RobertaConfig(**{**wide, "intermediate_size": 64, **shape}))
    else:
        small = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        module = DistilBertForSequenceClassification(DistilBertConfig(**{**small, **shape}))
    return Classifier(module, tokenizer(), name=f"tiny-{kind}")


def labelled(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different texts of 4 to 9 words, each with one word of its class: {id, text, label}."""
    rng, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        good = rng.random() < 0.5
        words = rng.choices(WORDS[11:], k=rng.randint(3, 8))
        words.insert(rng.randrange(len(words) + 1), rng.choice(GOOD if good else BAD))
        found[" ".join(words)] = "good" if good else "bad"
    return [{"id": f"t{seed}-{i}", "text": t, "label": label} for i, (t, label) in enumerate(found.items())]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@cache
def _learned() -> dict[str, torch.Tensor]:
    model = tiny_classifier(classes=2, initializer_range=0.05, hidden_dropout_prob=0.0)
    rows = labelled(384, seed=1)
    encoded = model.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    wanted = torch.tensor([NAMES.index(row["label"]) for row in rows])
    optimizer = torch.optim.Adam(model.module.parameters(), lr=3e-3)
    for step in range(60):
        part = slice(step % 6 * 64, step % 6 * 64 + 64)
        inputs = {name: values[part] for name, values in encoded.items()}
        torch.nn.functional.cross_entropy(model.module(**inputs).logits, wanted[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def learned() -> Classifier:
    """A BERT of two classes that has learned to tell `labelled` texts apart; a fresh copy each time."""
    model = tiny_classifier(classes=2, initializer_range=0.05, hidden_dropout_prob=0.0)
    model.module.load_state_dict(_learned(), strict=False)
    return model


def saved(model: Classifier, folder: Path) -> Path:
    """A folder as transformers saves it."""
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
