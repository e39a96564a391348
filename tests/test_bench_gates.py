"""The parts of scripts/bench_gates.py that its figures rest on."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from compress.decisions import DECISIONS, Rule
from tests.tiny import documents, perturbed, tiny_model


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "scripts" / "bench_gates.py"
    spec = importlib.util.spec_from_file_location("bench_gates", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gates"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_gates"]


def test_intervals_are_those_of_clopper_and_pearson(bench):
    assert bench.interval(0, 200) == (0.0, pytest.approx(1 - 0.025 ** (1 / 200), abs=1e-9))
    assert bench.interval(200, 200) == (pytest.approx(0.025 ** (1 / 200), abs=1e-9), 1.0)
    low, high = bench.interval(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0490, 0.1762)  # as tables give it


@pytest.mark.parametrize("name", ["perplexity", "divergence", "accuracy"])
def test_moving_a_loss_puts_the_pool_just_above_the_margin(bench, name):
    rng, check = np.random.default_rng(0), bench.CHECKS[name]
    weights = np.ones(600) if name == "accuracy" else rng.integers(20, 200, 600).astype(float)
    for loss in (0.01, 0.2):
        losses = weights * rng.exponential(loss, 600)
        if name == "accuracy":
            losses = (rng.random(600) < loss) * 1.0
        ratio = bench.moved(check, losses, weights).sum() / weights.sum() / check.margin
        # answers move in steps of 1/600, which is 6 % of the margin
        assert 1 < ratio <= (1.06 if name == "accuracy" else 1.0011)


def test_the_first_decision_by_betting_is_found_as_if_each_look_was_taken(bench):
    check, rng = bench.CHECKS["accuracy"], np.random.default_rng(1)
    for share in (0.0, 0.02, 0.12):
        losses = (rng.random(300) < share) * 1.0
        case = bench.Case(check, "", losses, np.ones(300), [100] * 300, check.margin)
        for seed in range(4):
            found = bench.decide(case, np.random.default_rng(seed))
            drawn = np.random.default_rng(seed).integers(0, 300, check.max_documents)
            rule = Rule(check.margin, 0.05, 0.05, 200, check.minimum_examples)
            for n in range(16, check.max_documents + 1, 16):
                verdict = DECISIONS["betting"](losses[drawn[:n]], np.ones(n), rule, False).verdict
                if verdict != "INCONCLUSIVE":
                    break
            assert found == (verdict, n)


def test_a_clear_case_takes_a_small_share_of_the_tokens(bench):
    baseline = tiny_model()
    data = documents(900)
    lines = [*bench.shares(baseline, {"near": perturbed(baseline, 0.01), "far": perturbed(baseline, 1.0)}, data)]
    assert [line.split(" | ")[3] for line in lines] == ["PASS", "PASS", "FAIL", "FAIL"]
    total = sum(len(text) for _, text in data.documents)  # one token per byte
    for line in lines:
        read = int(line.split(" | ")[5].split()[0].replace(",", ""))
        assert f"of {total:,}" in line and 0 < read < 0.2 * total
