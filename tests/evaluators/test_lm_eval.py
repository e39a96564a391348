"""Tasks of lm-evaluation-harness through our models: the same questions, the same answers, the same verdicts."""

import pytest

from evaluators import _lm_eval
from evaluators.accuracy import Accuracy
from tests.evaluators.harness import TASKS, letter, no_network, own_cache, speaking, theirs, write_data, write_task

__all__ = ["no_network", "own_cache"]  # fixtures

METRICS = {
    "mine": ("acc", "acc_norm"),
    "unprompted": ("acc",),
    "spaced": ("acc_bytes",),
    "filled": ("acc",),
    "mutual": ("acc_mutual_info",),
    "last_word": ("acc",),
    "written": ("exact_match,first",),
}


def check_of(path, name="mine", **more):
    return Accuracy(tasks=[f"lm_eval:{name}"], task_path=str(path), max_drop=3.0, **more)


def asked(check, model):
    (data,) = check.sources([])
    return check.examples(data, check.encoder(model))


@pytest.mark.parametrize("name", TASKS)
def test_answers_and_likelihoods_are_those_of_the_harness_own_model(name, tmp_path, no_network):
    model = speaking()
    path = write_task(tmp_path, name, write_data(tmp_path, 40, said=letter(model)))
    samples = theirs(model, path)
    for metric in METRICS[name]:
        check = check_of(tmp_path, name, metric=metric)
        examples = asked(check, model)
        part = check._parts()[name]
        assert len(examples) == 40
        scores = check.score(model, examples)
        known = [s for s in samples if s["filter"] == part.filter]
        by_place = {s["doc_id"]: s for s in known}
        for example, score in zip(examples, scores, strict=True):
            sample = by_place[example.payload.place]
            assert example.payload.document == sample["doc_hash"]
            assert 1 - score.total == sample[part.metric]
        assert {s.total for s in scores} == {0.0, 1.0}, "all alike would show nothing"
        if name == "written":
            continue
        likely = _lm_eval._likelihoods(model, [e.payload for e in examples])
        for example, found in zip(examples, likely, strict=True):
            expected = [r[0] for r in by_place[example.payload.place]["resps"]]
            assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
