"""The part of scripts/bench_lm_eval.py that says whether every document is judged as by the harness itself."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest

from tests.evaluators.harness import no_network, own_cache, speaking, write_data

__all__ = ["no_network", "own_cache"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread", "no_network")


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "scripts" / "bench_lm_eval.py"
    spec = importlib.util.spec_from_file_location("bench_lm_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_documents_are_judged_alike_by_both_and_a_difference_is_told(bench, tmp_path, capsys, monkeypatch):
    model = speaking()
    for part in (model.module, model.tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = Namespace(
        data=write_data(tmp_path, 30), fields="question,choices,gold", metric="acc_norm", documents=20, batch=8
    )
    options.model = str(tmp_path / "model")
    assert bench.exact(options)
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == found["documents_judged_alike"] == 20
    assert 0 < found["accuracy"]["ours"] == found["accuracy"]["hf"] < 1
    assert found["largest_difference_nats"] < 1e-3  # of three or four answers together, in float32
    asked = bench.judged_by_the_harness
    monkeypatch.setattr(bench, "judged_by_the_harness", lambda lm, task, metric: asked(lm, task, "acc"))
    monkeypatch.setattr(bench, "TASK", bench.TASK.replace("{metric}", "acc_norm}}, {{metric: acc"))
    assert not bench.exact(options)
