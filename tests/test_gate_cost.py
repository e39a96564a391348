"""What a gate's decision costs: shared forward passes, bounded memory, scores kept and found again, progress."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.model import Model
from compress.scoring import Memo, batches, cached_scores, score_key
from evaluators.perplexity import Perplexity
from tests.gates import DIVERGENCE, PERPLEXITY, Store, baseline, far, gate, near  # noqa: F401 (fixtures)
from tests.tiny import documents, perturbed, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(model):
    """The model, and a list that receives the number of rows of every forward pass."""
    rows = []
    handle = model.module.base_model.register_forward_hook(
        lambda _, args, kwargs, out: rows.append(1), with_kwargs=True
    )
    return rows, handle


def test_checks_on_the_same_windows_share_one_forward(baseline, near):
    data = documents(112)
    counts = {}
    for name, checks in {"divergence": (DIVERGENCE,), "both": (PERPLEXITY, DIVERGENCE)}.items():
        rows, handle = counted(near)
        gate(*checks).evaluate(near, baseline, [data])
        handle.remove()
        counts[name] = len(rows)
    assert counts["both"] == counts["divergence"] > 0


def test_sharing_changes_no_score(baseline, near):
    data = [documents(112)]
    together = gate(PERPLEXITY, DIVERGENCE).evaluate(near, baseline, data).checks
    for check, shared in zip((PERPLEXITY, DIVERGENCE), together, strict=True):
        alone = gate(check).evaluate(near, baseline, data).checks[0]
        assert shared.lower < alone.lower  # k = 2 against k = 1
        assert shared.model_copy(update={"lower": alone.lower}) == alone


@pytest.mark.parametrize("kept", [0, 2, 100])
def test_memory_for_logits_is_bounded_and_right(baseline, kept):
    windows = [(1, 2, 3), (4, 5), (1, 2, 3), (6, 7, 8, 9), (5, 5)]
    want = [rows.clone() for rows in baseline.logits(windows)]
    memo = Memo(baseline, free=kept * 3 * 256 * 4)
    for _ in range(2):
        for a, b in zip(memo.logits(windows), want, strict=True):
            torch.testing.assert_close(a, b)
        assert sum(rows.nbytes for rows in memo.kept.values()) <= kept * 3 * 256 * 4
    assert len(memo.kept) == {0: 0, 2: 2, 100: 4}[kept]
    assert (memo.digest, memo.context_length) == (baseline.digest, baseline.context_length)


def test_reference_scores_come_from_the_cache_and_change_nothing(baseline, near, far):
    store, data = Store(), [documents(64)]
    first = gate(PERPLEXITY).evaluate(near, baseline, data, cache=store)
    assert len(store) == 4 and store.hits == 0
    rows, handle = counted(baseline)
    again = gate(PERPLEXITY).evaluate(near, baseline, data, cache=store)
    looser = gate(Perplexity(max_increase="6%", confidence=0.9)).evaluate(near, baseline, data, cache=store)
    handle.remove()
    assert again == first and looser.verdict == "PASS"
    assert not rows and store.hits == 8 and len(store) == 4
    assert gate(PERPLEXITY).evaluate(far, baseline, data, cache=store).verdict == "FAIL"


def test_a_score_from_the_cache_equals_the_one_that_was_put(baseline):
    store, data = Store(), documents(3)
    batch = PERPLEXITY.examples(data, baseline.encode)
    fresh = cached_scores(PERPLEXITY, baseline, data, batch, store)
    assert len(store) == 1 and cached_scores(PERPLEXITY, baseline, data, batch, store) == fresh
    assert store.hits == 1


def test_scores_that_are_not_finite_are_not_kept(baseline, near):
    store = Store()
    gate(PERPLEXITY).evaluate(near, perturbed(baseline, math.nan), [documents(60)], cache=store)
    assert not store


def test_the_key_of_a_score_holds_all_that_it_depends_on(baseline, near):
    data = documents(2)
    batch = PERPLEXITY.examples(data, baseline.encode)
    key = score_key(PERPLEXITY, baseline, data, batch)
    assert key == score_key(Perplexity(max_increase="6%", max_documents=99), tiny_model(), data, batch)
    others = [
        score_key(DIVERGENCE, baseline, data, batch),
        score_key(PERPLEXITY, near, data, batch),
        score_key(PERPLEXITY, Model(baseline.module, baseline.tokenizer, "bfloat16"), data, batch),
        score_key(PERPLEXITY, baseline, replace(data, digest="other"), batch),
        score_key(PERPLEXITY, baseline, replace(data, length=32), batch),
        score_key(PERPLEXITY, baseline, data, batch[:1]),
        score_key(PERPLEXITY, baseline, data, [replace(batch[0], payload=((1, 2),)), batch[1]]),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others.append(score_key(PERPLEXITY, baseline, data, batch))
    torch.set_num_threads(threads)
    assert len({key, *others}) == 1 + len(others)


def test_scores_of_before_a_change_of_what_is_read_or_of_what_ends_a_text_are_not_used(baseline):
    data = documents(2)
    batch = PERPLEXITY.examples(data, baseline.encode)
    key, beside = score_key(PERPLEXITY, baseline, data, batch), ["a judge"]

    class Judged(Perplexity):
        def reads(self):
            return beside[0]

    judged = Judged(max_increase="5%")
    first = score_key(judged, baseline, data, batch)
    beside[0] = "another judge in its place"
    assert len({key, first, score_key(judged, baseline, data, batch)}) == 3
    twin = tiny_model()
    twin.module.generation_config.eos_token_id = [7, 3]
    assert twin.digest == baseline.digest  # the weights are the same, and what it writes is not
    ends = score_key(PERPLEXITY, twin, data, batch)
    twin.module.generation_config.eos_token_id = [3, 7]
    assert ends == score_key(PERPLEXITY, twin, data, batch) != key


@given(st.lists(st.integers(0, 12_000), max_size=60))
def test_batches_partition_the_documents(sizes):
    docs = [(str(i), "x" * size) for i, size in enumerate(sizes)]
    cut = list(batches(docs))
    assert [d for batch in cut for d in batch] == docs
    assert all(1 <= len(batch) <= 16 for batch in cut)
    assert all(len(batch) == 1 or sum(len(t) for _, t in batch) <= 8000 for batch in cut)


def test_progress_ends_at_one(baseline, near):
    seen = []
    gate(PERPLEXITY).evaluate(near, baseline, [documents(80)], progress=lambda *event: seen.append(event))
    assert {label for label, _ in seen} == {"perplexity on words"}
    assert [f for _, f in seen] == sorted(f for _, f in seen) and seen[-1][1] == 1.0


def test_progress_of_several_checks_and_sources_never_falls_back(baseline, near):
    seen = []
    both = [documents(80), documents(70, source="others")]
    gate(PERPLEXITY, DIVERGENCE).evaluate(near, baseline, both, progress=lambda *event: seen.append(event))
    assert {"perplexity, divergence on words", "perplexity, divergence on others"} <= {label for label, _ in seen}
    fractions = [f for _, f in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and 0.5 in fractions
