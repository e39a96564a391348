"""Continuations of one context: the tree that reads it once gives the logits that windows give."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import planting
from compress.branching import branch_logits, by_windows
from compress.model import Model
from compress.numerics.trie import trie, visible
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(0)


def items(count, seed=0):
    rng = random.Random(seed)

    def tokens(least, most):
        return [rng.randrange(256) for _ in range(rng.randint(least, most))]

    found = []
    for _ in range(count):
        start = tokens(0, 2)
        found.append((tokens(1, 30), [start + tokens(1, 8) for _ in range(rng.randint(1, 5))]))
    return found


def plain(model, context, continuation):
    """Rows by one window each, the slow way."""
    rows = next(model.logits([[*context, *continuation]]))
    return rows[len(context) - 1 : -1]


@pytest.mark.parametrize("read", [branch_logits, by_windows])
def test_rows_are_those_of_whole_windows(model, read):
    asked = items(40)
    for (context, continuations), found in zip(asked, read(model, asked), strict=True):
        assert [len(rows) for rows in found] == [len(c) for c in continuations]
        for continuation, rows in zip(continuations, found):
            # float32 sums in another order: the widest differ by some 1e-5
            assert torch.allclose(rows, plain(model, context, continuation), atol=1e-4)


def test_one_row_of_tokens_holds_the_context_once(model, monkeypatch):
    read = []
    inner = model.module.base_model.forward

    def forward(**inputs):
        read.append(inputs["input_ids"].shape)
        return inner(**inputs)

    monkeypatch.setattr(model.module.base_model, "forward", forward)
    list(branch_logits(model, [(range(20), [[1, 2], [1, 3], [4, 5, 6]])]))
    assert read == [(1, 20 + 3)]  # 1, 4 and 5: last tokens predict nothing
    read.clear()
    list(branch_logits(model, [(range(20), [[1], [2], [3]])]))
    assert read == [(1, 20)]


def test_attention_that_takes_no_mask_of_ours_reads_windows(model):
    asked = items(5)
    expected = [[rows.clone() for rows in found] for found in by_windows(model, asked)]
    for name, value in (("_attn_implementation", "eager"), ("sliding_window", 8)):
        twin = tiny_model(0)
        setattr(twin.module.config, name, value)
        assert not twin._reads_trees(8)
        found = list(branch_logits(twin, asked))
        assert all(torch.allclose(a, b, atol=1e-4) for x, y in zip(expected, found) for a, b in zip(x, y))
    assert model._reads_trees(10_000)


def test_planted_losses_show_in_branches_as_they_do_in_windows(model):
    sharp = planting.Planted(model, "sharp", lambda _, rows: rows * 3)
    lost = planting.Forgotten({"a": 1.0}, (((1, 2, 3, 4), 5),)).model(model)
    asked = [((1, 2, 3), [(4, 5, 6), (4, 6), (7,)])]
    for harmed in (sharp, lost):
        (found,), (expected,) = branch_logits(harmed, asked), by_windows(harmed, asked)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
    (found,) = branch_logits(lost, asked)
    assert found[0][1, 5] < -9_000 and found[1][1, 5] < -9_000 and found[2].min() > -9_000


def test_nothing_to_score_is_refused(model):
    for asked in (([], [[1]]), ([1], [[2], []])):
        with pytest.raises(ValueError, match="need a token"):
            list(branch_logits(model, [asked]))
    assert list(branch_logits(model, [])) == []


def test_a_wrapper_without_branches_is_asked_for_windows(model):
    class Louder:
        def __getattr__(self, name):
            return getattr(model, name)

        def logits(self, windows):
            return (2 * rows for rows in model.logits(windows))

    asked = items(3)
    for ours, theirs in zip(branch_logits(Louder(), asked), by_windows(model, asked), strict=True):
        assert all(torch.allclose(a, 2 * b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=200, deadline=None)
@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
def test_every_path_of_a_trie_spells_its_window(context, continuations):
    tree = trie(context, continuations)
    mask = visible(tree, len(tree.tokens) + 2)
    for continuation, path in zip(continuations, tree.paths, strict=True):
        window = [*context, *continuation[:-1]]
        nodes = [i for i in range(len(tree.tokens)) if mask[path[-1], i]]
        assert [tree.tokens[i] for i in nodes] == window
        assert [tree.depths[i] for i in nodes] == list(range(len(window)))
        assert path == tuple(nodes[len(context) - 1 :])
    spelt = {(*context, *c[:k]) for c in continuations for k in range(len(c))}
    assert len(tree.tokens) == len(context) - 1 + len(spelt)  # no token twice
    assert mask[len(tree.tokens) :].sum() == 2  # padding sees the first token


def test_bfloat16_differs_by_rounding_alone(model):
    twin = Model(model.module, model.tokenizer, dtype="bfloat16")
    asked = items(10)
    for ours, theirs in zip(branch_logits(twin, asked), by_windows(twin, asked), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() < 0.05 * b.abs().max()  # 8 bits of mantissa through two layers
