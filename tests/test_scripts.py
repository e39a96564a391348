"""The parts of bench_decisions.py, bench_prune.py, mutate.py and interop_llama_kl.py that their figures rest on."""

import ast
import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import perturbed, tiny_model
from tests.tiny_gguf import tiny

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """All as modules; one imports another script by name, as it does when it is run."""
    sys.path.insert(0, str(SCRIPTS))
    found = {}
    for name in ("bench_decisions", "bench_prune", "mutate", "interop_llama_kl"):
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


def test_the_second_half_of_each_window_is_compared_as_llama_cpp_does(scripts):
    script, reference = scripts["interop_llama_kl"], tiny_model()
    model, cut = perturbed(reference, 0.3), [list(range(20, 52)), list(range(90, 122))]
    kl, agree = [], []
    for window in cut:
        with torch.no_grad():
            p, q = (m.module(input_ids=torch.tensor([window])).logits[0].double() for m in (reference, model))
        for row in range(16, 31):  # tools/perplexity: from n_ctx / 2 on, n_ctx - 1 - n_ctx / 2 rows
            kl.append(float((p[row].softmax(0) * (p[row].log_softmax(0) - q[row].log_softmax(0))).sum()))
            agree.append(int(p[row].argmax() == q[row].argmax()))
    found = script.own(reference, model, cut)
    assert found == pytest.approx((sum(kl) / 30, sum(agree) / 30), abs=1e-6)
    assert script.said("x\nMean    KLD:   0.004321 ±   0.000123\nSame top p: 98.431 ± 0.312 %") == (0.004321, 0.98431)
    with pytest.raises(SystemExit, match="no mean KLD"):
        script.said("error: cannot open")


def test_windows_are_read_from_what_the_tool_keeps(scripts, tmp_path):
    read, base = scripts["interop_llama_kl"].windows_of, tmp_path / "base"
    base.write_bytes(b"_logits_" + struct.pack("<3i", 3, 50, 2) + struct.pack("<6i", 5, 6, 7, 8, 9, 49) + b"scores")
    assert read(base) == [[5, 6, 7], [8, 9, 49]]
    base.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(SystemExit, match="does not begin"):
        read(base)


@pytest.mark.usefixtures("one_thread")
def test_pruned_rows_are_timed_in_the_baselines_encoding(scripts, monkeypatch, tmp_path):
    bench, baseline = scripts["bench_prune"], tiny(intermediate_size=160)
    monkeypatch.setattr(bench, "FORMATS", ("gguf",))  # the other one takes its builder some seconds
    monkeypatch.setattr(bench, "SECONDS", 0.5)
    bench._write_int8(bench.fresh(baseline), tmp_path)
    model = bench.fresh(baseline)
    bench._prune(model, "magnitude 50 %", [], 0)
    found = bench._runtimes(model, tmp_path)["gguf"]
    assert {str(encoded.encoding) for encoded in model.encoded.values()} == {"int8 g32"} and model.masks
    assert found["size_bytes"] == sum(p.stat().st_size for p in (tmp_path / "gguf").iterdir())
    for part in ("prefill", "decode"):
        ratio, lower, upper = found[f"{part}_times_as_fast"]
        assert lower <= ratio <= upper and 1 / 3 < ratio < 3 and found[f"{part}_tokens_per_second"] > 0
    narrow = bench.fresh(baseline)
    bench._prune(narrow, "neurons, no update", [torch.arange(64)], 0)
    assert bench._runtimes(narrow, tmp_path)["gguf"]["size_bytes"] < found["size_bytes"]
