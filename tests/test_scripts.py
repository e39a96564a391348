"""The parts of scripts/bench_decisions.py and scripts/mutate.py that their figures rest on."""

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """Both as modules; one imports another script by name, as it does when it is run."""
    sys.path.insert(0, str(SCRIPTS))
    found = {}
    for name in ("bench_decisions", "mutate"):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        sys.modules[name] = found[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(found[name])
    yield found
    sys.path.remove(str(SCRIPTS))
    for name in (*found, "bench_gates"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cases(scripts):
    return list(scripts["bench_decisions"].cases())


def test_simulated_losses_are_as_large_as_they_claim(cases):
    for case in cases:
        for loss in (0.0, case.check.margin):
            losses, weights = case.draw(np.random.default_rng(0), 200_000, loss)
            found = losses.sum() / weights.sum()
            assert found == pytest.approx(loss, abs=0.1 * abs(case.check.margin)), (case.check.name, case.shape)
            if case.check.statistic == "betting":
                assert np.abs(losses / weights).max() <= 1


def test_every_statistic_that_samples_is_simulated(cases):
    from compress.plugin import evaluator, names

    sampled = {evaluator(name).statistic for name in names("evaluator")} - {"census", "exact"}
    assert {case.check.statistic for case in cases} == sampled == {"mean", "betting"}


def test_a_case_decides_as_its_loss_demands(scripts, cases):
    rng = np.random.default_rng(0)
    for case in cases:
        limit = case.check.max_documents or case.limit
        if case.check.margin > 0:
            assert scripts["bench_decisions"].decide(case, rng, limit, 0.0) == "PASS", (case.check.name, case.shape)
        if case.check.statistic == "mean":
            far = case.check.margin + abs(case.check.margin)
            assert scripts["bench_decisions"].decide(case, rng, limit, far) == "FAIL", (case.check.name, case.shape)
    shown = scripts["bench_decisions"].row(cases[0], 0, 20)
    assert shown.startswith("| perplexity | normal | +5.0 % | 400 | ") and shown.count("|") == 8


def test_every_mutant_is_one_flipped_operator_that_still_parses(scripts):
    mutate = scripts["mutate"]
    for file in mutate.TESTS:
        text, found = (mutate.ROOT / file).read_text(), mutate.mutants(file)
        assert len(found) > 5
        original = ast.dump(ast.parse(text))
        for mutant in found[::9]:
            changed = text[: mutant.start] + mutant.new + text[mutant.end :]
            assert text[mutant.start : mutant.end] == mutant.old != mutant.new
            assert ast.dump(ast.parse(changed)) != original
    listed = {m.name for file in mutate.TESTS for m in mutate.mutants(file)}
    assert set(mutate.EQUIVALENT) <= listed and all(mutate.EQUIVALENT.values())


def test_comparisons_inside_of_chains_strings_and_annotations(scripts, tmp_path, monkeypatch):
    mutate = scripts["mutate"]
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    (tmp_path / "m.py").write_text(
        'def f(x: "int | None" = -1) -> bool:\n    return not 0 < x <= 3 and "ü < y" != x + 1\n'
    )
    found = [(m.old, m.new) for m in mutate.mutants("m.py")]
    assert found == [
        ("-", ""),
        ("not", ""),
        ("<", "<="),
        ("<", ">="),
        ("<=", "<"),
        ("<=", ">"),
        ("and", "or"),
        ("!=", "=="),
        ("+", "-"),
    ]
