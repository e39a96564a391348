"""Gates over tasks of lm-evaluation-harness: verdicts, planted losses, integrity, and what is refused beforehand."""

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from compress import assay, plan, plugin
from compress.branching import branch_logits, by_windows
from compress.errors import GateInconclusive, NetworkError, RecipeError, UnsafeInput
from compress.gate import Gate
from compress.interfaces import P_VALUE
from compress.measure import _without_margin, measure
from compress.numerics.paired import holm, mcnemar
from evaluators import _lm_eval, _lm_eval_tasks
from evaluators.accuracy import Accuracy, summaries
from tests import tiny_gguf, tiny_onnx
from tests.evaluators.harness import TASKS, letter, no_network, own_cache, preferred, speaking, write_data, write_task
from tests.tiny import perturbed

pytestmark = pytest.mark.usefixtures("no_network")
__all__ = ["no_network", "own_cache"]  # fixtures
ROOT = Path(__file__).parents[2]


def check_of(folder, name="mine", drop=5.0, **more):
    return Accuracy(tasks=[f"lm_eval:{name}"], task_path=str(folder), max_drop=drop, **more)


def judge(check, model, baseline, **more):
    (result,) = Gate((check,)).evaluate(model, baseline, [], **more).checks
    return result


@pytest.fixture(scope="module")
def baseline():
    return speaking()


@pytest.fixture(scope="module")
def folder(baseline, tmp_path_factory):
    """Three tasks over the same 300 questions, of which the baseline answers all as the first one has it."""
    found = tmp_path_factory.mktemp("tasks")
    preferred(found, "mine", baseline, 300)
    return found


# --- verdicts --------------------------------------------------------------------------------------------------


def test_a_near_model_passes_and_a_far_one_fails_with_flips_both_ways(baseline, folder):
    near = judge(check_of(folder), perturbed(baseline, 0.001), baseline)
    assert (near.verdict, near.source) == ("PASS", "lm_eval:mine by acc")
    assert near.details["baseline on mine"] == 1.0 and near.reference == 1.0
    assert near.upper <= 0.05 and near.examples < 268  # the first 32 only prove that the baseline counts
    far = judge(check_of(folder), perturbed(baseline, 4.0), baseline)
    assert far.verdict == "FAIL" and far.lower > 0.05
    assert far.details["right to wrong"] > 10 and far.details["wrong to right"] == 0
    assert [s.note for s in far.samples] == ["right to wrong"] * 4
    for sample in far.samples:
        assert sample.prompt.startswith("Q: ") and sample.prompt.endswith("\nA:") and sample.reference != sample.model
    back = judge(check_of(folder), baseline, perturbed(baseline, 0.3))
    assert back.details["wrong to right"] > 0


def test_figures_of_a_fixed_sample_stand_beside_the_decision(baseline, folder):
    check = check_of(folder)
    result = judge(check, perturbed(baseline, 4.0), baseline)
    found = result.details
    worse, better = found["right to wrong"], found["wrong to right"]
    assert worse > 10 > better and found[P_VALUE] == mcnemar(int(worse), int(better)) < 0.05
    assert found["change in points, from (Newcombe, 95 %)"] < 100 * (better - worse) / result.examples < found["to"] < 0
    assert f"{P_VALUE}, Holm" not in found


def test_p_values_of_several_tasks_are_corrected(baseline, folder, tmp_path):
    write_task(tmp_path, "mine", folder / "questions.jsonl")
    write_task(tmp_path, "again", folder / "questions.jsonl", TASKS["mine"])
    check = Accuracy(tasks=["lm_eval:mine", "lm_eval:again"], task_path=str(tmp_path), max_drop=5.0)
    found = Gate((check,)).evaluate(perturbed(baseline, 4.0), baseline, []).checks
    plain, corrected = ([c.details[key] for c in found] for key in (P_VALUE, f"{P_VALUE}, Holm"))
    assert corrected == holm(plain) and max(plain) < 1 and corrected != plain


def test_a_task_may_name_the_field_that_clusters_its_documents(baseline, folder, tmp_path):
    body = TASKS["mine"] + "metadata: {cluster: passage}\n"
    write_task(tmp_path, "mine", folder / "questions.jsonl", body)
    (alone,), (together,) = check_of(folder).sources([]), check_of(tmp_path).sources([])
    assert (len(alone.documents), len(together.documents)) == (300, 75)
    examples = check_of(tmp_path).examples(together, check_of(tmp_path).encoder(baseline))
    assert len(examples) == 300 and len({e.cluster for e in examples}) == 75
    write_task(tmp_path, "mine", folder / "questions.jsonl", body.replace("passage", "chapter"))
    with pytest.raises(RecipeError, match="metadata.cluster names 'chapter', which document 0 does not have"):
        check_of(tmp_path).sources([])


def test_equal_documents_are_one_cluster(baseline, tmp_path):
    data = write_data(tmp_path, 5)
    data.write_text(2 * data.read_text())
    write_task(tmp_path, "mine", data)
    check = check_of(tmp_path)
    (found,) = check.sources([])
    assert len(found.documents) == 5
    examples = check.examples(found, check.encoder(baseline))
    assert len({e.id for e in examples}) == 10 and sorted(e.payload.place for e in examples) == [*range(10)]


@pytest.mark.parametrize("name", ["mine", "filled", "mutual", "unprompted"])
def test_a_planted_loss_is_seen(name, baseline, tmp_path):
    preferred(tmp_path, name, baseline, 160)
    ((found,),) = assay.examine([check_of(tmp_path, name)], baseline, [])
    assert (found.verdict, found.reason) == ("SEEN", "")
    assert found.planted == pytest.approx(found.measured) and 0.05 < found.planted < 0.12


def test_what_the_model_writes_is_gated_yet_no_loss_is_planted_in_it(baseline, tmp_path):
    data = write_data(tmp_path, 120, said=lambda question: letter(baseline)(question + " " * (len(question) % 2)))
    write_task(
        tmp_path,
        "written",
        data,
        TASKS["written"].replace('"e", " "', '"\\\\n\\\\n"').replace("{{question}} ", "{{question}}"),
    )
    check = check_of(tmp_path, "written")
    ((found,),) = assay.examine([check], baseline, [])
    assert found.verdict == "UNTESTED" and "not one of its choices" in found.reason


# --- runtimes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,tiny", [("gguf", tiny_gguf.tiny), ("onnx", lambda: tiny_onnx.tiny("llama", True))])
def test_every_runtime_gives_the_same_answers(name, tiny, folder, tmp_path):
    model, exporter = tiny(), plugin.exporter(name)()
    exporter.write(model, tmp_path)
    runtime = exporter.open(tmp_path)
    check = check_of(folder)
    (data,) = check.sources([])
    data = replace(data, documents=data.documents[:30])
    ours, others = check.examples(data, check.encoder(model)), check.examples(data, check.encoder(runtime))
    assert ours == others and len(ours) == 30 and runtime.bos_id == model.bos_id
    mine, found = (_lm_eval._likelihoods(m, [e.payload for e in ours]) for m in (model, runtime))
    clear = 0
    for a, b, new, old in zip(mine, found, check.score(runtime, ours), check.score(model, ours), strict=True):
        assert [n for n, _ in a] == pytest.approx([n for n, _ in b], abs=0.1)  # llama.cpp's cache is float16
        first, second = sorted((n for n, _ in a), reverse=True)[:2]
        if first - second > 0.2:
            clear += 1
            assert new.total == old.total
    branches = [(c, [x for _, x in pairs]) for c, pairs in _by_context(ours)]
    for shared, alone in zip(branch_logits(runtime, branches), by_windows(runtime, branches), strict=True):
        assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(shared, alone, strict=True))  # float16 cache
    runtime.close()
    assert clear > 10


def _by_context(examples):
    return itertools.groupby((r for e in examples for r in e.payload.requests), key=lambda pair: pair[0])


# --- integrity -------------------------------------------------------------------------------------------------


def test_another_document_in_its_place_is_invalid(baseline, folder):
    check = check_of(folder)
    (data,) = check.sources([])
    examples = check.examples(data, check.encoder(baseline))[:3]
    forged = [replace(e, payload=e.payload._replace(document="0" * 64)) for e in examples]
    with pytest.raises(GateInconclusive, match="its hash differs"):
        check.score(baseline, forged)

    class Forged(Accuracy):
        def examples(self, data, encode):
            found = super().examples(data, encode)
            return [replace(e, payload=e.payload._replace(place=0)) for e in found]

    forger = Forged(tasks=check.tasks, task_path=check.task_path, max_drop=5.0)
    result = judge(forger, perturbed(baseline, 0.1), baseline)
    assert result.verdict == "INVALID" and "its hash differs" in result.definition


def test_a_changed_file_is_another_source_and_another_key(baseline, tmp_path):
    data = write_data(tmp_path, 20)
    write_task(tmp_path, "mine", data)
    check = check_of(tmp_path)
    before, key = check.sources([])[0], check.reads()
    assert check_of(tmp_path).sources([])[0].digest == before.digest and check_of(tmp_path).reads() == key
    data.write_text(data.read_text().replace('"gold": 0', '"gold": 1'))
    after = check.sources([])[0]
    assert after.digest != before.digest and check.reads() != key
    assert [n for n, _ in after.documents] != [n for n, _ in before.documents]  # the harness hashes answers, too
    assert check_of(tmp_path, metric="acc_norm").sources([])[0].digest != after.digest
    write_task(tmp_path, "mine", data, TASKS["mine"].replace("Q:", "Question:"))
    assert check.sources([])[0].digest != after.digest
    assert Accuracy(max_drop=3.0).reads() == ""


def test_scores_that_are_not_numbers_are_invalid(baseline, folder):
    broken = perturbed(baseline, 0.0)
    with torch.no_grad():
        broken.parameter("lm_head.weight").fill_(math.nan)
    broken.touch()
    result = judge(check_of(folder), broken, baseline)
    assert result.verdict == "INVALID" and "not finite" in result.definition


def test_a_metric_that_says_neither_right_nor_wrong_is_invalid(baseline, folder, tmp_path):
    body = TASKS["mine"] + "  - {metric: brier_score, aggregation: brier_score, higher_is_better: true}\n"
    write_task(tmp_path, "mine", folder / "questions.jsonl", body)
    result = judge(check_of(tmp_path, metric="brier_score"), perturbed(baseline, 0.1), baseline)
    assert result.verdict == "INVALID" and "name another metric of the task" in result.definition


def test_a_task_that_cannot_judge_is_invalid(baseline, folder, monkeypatch):
    check = check_of(folder)

    def fail(*_):
        raise KeyError("answer")

    monkeypatch.setattr(check._parts()["mine"].task, "process_results", fail)
    result = judge(check, perturbed(baseline, 0.1), baseline)
    assert result.verdict == "INVALID" and "mine cannot judge document" in result.definition


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_no_document_is_inconclusive(text, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text(text)
    write_task(tmp_path, "mine", data)
    with pytest.raises(GateInconclusive, match="has no document") as raised:
        check_of(tmp_path).sources([])
    assert raised.value.exit_code == 4


def test_too_few_documents_are_invalid(baseline, tmp_path):
    preferred(tmp_path, "mine", baseline, 32 + 49)
    result = judge(check_of(tmp_path), perturbed(baseline, 0.1), baseline)
    assert result.verdict == "INVALID" and "at least 50 are needed" in result.definition


def test_always_giving_the_commonest_answer_is_guessing(tmp_path):
    rows = [{"question": str(i), "choices": ["yes", "no"], "gold": int(i % 5 == 0)} for i in range(50)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(tmp_path, "mine", data)
    check = check_of(tmp_path)
    check.sources([])
    assert check._parts()["mine"].chance == 0.8
    rows = [{**row, "choices": [f"a{i}", f"b{i}", f"c{i}", f"d{i}"]} for i, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check._parts()["mine"].chance == 0.25  # where answers differ, their place tells nothing


# --- refused beforehand ----------------------------------------------------------------------------------------

CODE = {
    "function": TASKS["mine"] + "process_docs: !function code.run\n",
    "python": TASKS["mine"] + "x: !!python/object/apply:os.system [ls]\n",
    "hf_evaluate": TASKS["mine"].replace("metric: acc,", "metric: acc, hf_evaluate: true,"),
    "metric": TASKS["mine"].replace("metric: acc,", "metric: ./code.py,"),
    "pickle": TASKS["mine"] + "dataset_path: pandas\n",
    "unsafe": TASKS["written"] + "unsafe_code: true\n",
    "included": "include: other.yaml\n",
}


@pytest.mark.parametrize("kind", CODE)
def test_task_yaml_is_data(kind, tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef run(docs): return docs\n")
    (tmp_path / "other.yaml").write_text("process_docs: !function code.run\n")
    inner = tmp_path / "tasks"
    inner.mkdir()
    write_task(inner, "mine", write_data(tmp_path, 5), CODE[kind].replace("other.yaml", "../other.yaml"))
    with pytest.raises(UnsafeInput, match="task YAML is data here") as raised:
        check_of(inner).sources([])
    assert raised.value.exit_code == 5 and not (tmp_path / "ran").exists()


def test_templates_cannot_leave_their_document(tmp_path):
    body = TASKS["mine"].replace("{{question}}", "{{ ().__class__.__base__.__subclasses__() }}")
    write_task(tmp_path, "mine", write_data(tmp_path, 5), body)
    with pytest.raises(RecipeError, match="SecurityError"):
        check_of(tmp_path).sources([])


def test_code_that_the_model_writes_is_not_run():
    with pytest.raises(UnsafeInput, match=r"lm_eval:humaneval runs what the model writes; .* code: \{data"):
        Accuracy(tasks=["lm_eval:humaneval"], max_drop=3.0).sources([])


@pytest.mark.parametrize(
    ("body", "fields", "reason"),
    [
        ("mine", {"metric": "f1"}, "has no metric 'f1' that says right or wrong; it has acc, acc_norm"),
        ("mine", {"metric": "acc,strict"}, "has no filter 'strict'; it has none"),
        ("last_word", {"metric": "perplexity"}, "has no metric 'perplexity' that says right or wrong"),
        ("rolling", {}, "whole texts; gate it by perplexity"),
        ("sampled", {}, "only greedy ones repeat"),
        ("broken", {}, "'nothing' is undefined"),
    ],
)
def test_tasks_that_cannot_be_gated_are_refused(body, fields, reason, tmp_path):
    bodies = {
        **TASKS,
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n',
        "sampled": TASKS["written"].replace("do_sample: false", "do_sample: true"),
        "broken": TASKS["mine"].replace("{{question}}", "{{nothing}}"),
    }
    write_task(tmp_path, "mine", write_data(tmp_path, 5), bodies[body])
    with pytest.raises(RecipeError, match=reason) as raised:
        check_of(tmp_path, **fields).sources([])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"task_path": "tasks"}, "task_path is for tasks of lm_eval"),
        ({"metric": "acc"}, "metric is for tasks of lm_eval"),
        ({"tasks": ["lm_eval:a", "lm_eval:a"]}, "a task is listed twice"),
        ({"tasks": ["lm-eval:a"]}, "did you mean lm_eval:NAME"),
    ],
)
def test_senseless_fields_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        Accuracy(max_drop=3.0, **fields)


def test_no_yaml_at_the_path_is_refused(tmp_path):
    for check in (check_of(tmp_path), check_of(tmp_path / "none")):
        with pytest.raises(RecipeError, match="no task YAML there"):
            check.sources([])


# --- the hub ---------------------------------------------------------------------------------------------------


def test_data_of_the_hub_without_network_exit_9_and_plan_says_that_it_does_not_know(folder, monkeypatch):
    check = Accuracy(tasks=["lm_eval:arc_easy", "lm_eval:mine"], task_path=str(folder), max_drop=5.0)
    from huggingface_hub import constants

    foreseen = check.foreseen([])
    assert foreseen[0] == "lm_eval:arc_easy" and len(foreseen[1].documents) == 300
    assert not constants.HF_HUB_OFFLINE  # as before
    unknown, known = plan._powers([check], 1, [])
    assert (unknown["documents"], unknown["resolves"]) == (None, None) and unknown["lossless"] > 100
    assert known["documents"] == 300 and known["source"] == "lm_eval:mine by acc"
    (warning,) = plan._power_warnings("release", [unknown])
    assert "lm_eval:arc_easy: the documents are not here" in warning
    monkeypatch.setattr(_lm_eval_tasks, "_offline", _offline_always(_lm_eval_tasks._offline))  # five retries take 23 s
    with pytest.raises(NetworkError, match="lm_eval:arc_easy: its data cannot be had from the hub") as raised:
        check.sources([])
    assert raised.value.exit_code == 9 and "\n" not in str(raised.value)


def _offline_always(inner):
    return lambda wanted: inner(True)


# --- elsewhere -------------------------------------------------------------------------------------------------


def test_eval_takes_the_file_of_a_task(baseline, folder):
    check = _without_margin(f"accuracy:lm_eval:{folder}/mine.yaml")
    (data,) = check.sources([])
    found = measure(check, perturbed(baseline, 1.0), replace(data, documents=data.documents[:60]), reference=baseline)
    assert (found.source, found.examples) == ("lm_eval:mine by acc", 60)
    assert found.against["loss"] == pytest.approx(1 - found.value) and found.value < 1


def test_the_task_of_the_docs_works(baseline, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8")
    (listing,) = re.findall(r"^```yaml\n(# tasks/lambada.yaml\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "lambada.yaml").write_text(listing)
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "The last word\\nis here"}\n{"text": "and there"}\n')
    monkeypatch.chdir(tmp_path)
    check = Accuracy(tasks=["lm_eval:lambada"], task_path="tasks", max_drop=3.0)
    (data,) = check.sources([])
    asked = sorted(json.loads(text)[0][4] for _, text in data.documents)
    assert asked == [[["The last word\nis", [" here"]]], [["and", [" there"]]]]
    assert len(check.score(baseline, check.examples(data, check.encoder(baseline)))) == 2


def test_importing_and_validating_a_check_needs_no_library_of_models():
    code = "import sys\nfrom evaluators.accuracy import Accuracy\n"
    code += "Accuracy(tasks=['lm_eval:arc_easy'], max_drop=3.0).reads()\n"
    code += "print(sorted({'torch', 'transformers', 'datasets', 'lm_eval', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_tasks_are_listed():
    assert {*summaries()} == {"minimal_pairs", "cloze", "facts", "lm_eval:NAME"} and all(summaries().values())
