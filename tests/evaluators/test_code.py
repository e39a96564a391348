"""Written programs against unit tests: pass@k by enumeration, hostile files, permission, and the gate over answers."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress import permission, plan
from compress.errors import Corrupt, RecipeError
from compress.gate import Gate
from compress.interfaces import Score
from compress.measure import evaluate
from compress.model import Model
from compress.numerics.sampling import greedy, gumbel
from evaluators import _problems, _sandbox
from evaluators.code import Code, pass_at_k
from tests import tiny_gguf
from tests.test_cli import run as command

HUMANEVAL = {
    "task_id": "one",
    "prompt": 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """The sum."""\n',
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}
MBPP = {"task_id": 2, "text": "Write a function to double a number.", "test_list": ["assert double(2) == 4"]}


def write(tmp_path, rows, name="problems.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return f"file:{path}"


# --- pass@k --------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_passing_program(passed, data):
    k = data.draw(st.integers(1, len(passed)))
    subsets = list(itertools.combinations(passed, k))
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_draws_follow_the_softmax_and_pair_with_those_of_another_model():
    logits = np.array([0.0, 1.0, 2.0, -1.0], dtype=np.float32)
    for temperature in (0.5, 2.0):
        want = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        pick = gumbel(temperature, 0)
        counts = np.bincount([pick(torch.tensor(logits)) for _ in range(4000)], minlength=4) / 4000
        assert np.abs(counts - want).max() < 4 * math.sqrt(0.25 / 4000)  # four standard errors
    near = logits + np.array([0.0, 0.05, 0.0, 0.0], dtype=np.float32)
    ours, theirs, alone = gumbel(1.0, 7), gumbel(1.0, 7), gumbel(1.0, 8)
    same = [(ours(logits), theirs(near), alone(near)) for _ in range(500)]
    assert sum(a == b for a, b, _ in same) > 480 > 350 > sum(a == c for a, _, c in same)
    assert greedy(logits) == greedy(torch.tensor(logits)) == 2


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["{"], ":1: expected a JSON object in the layout of HumanEval"),
        ([{"text": "a"}], ":1: .*test_list is empty"),
        ([{**MBPP, "test_list": []}], "test_list is empty"),
        ([{**MBPP, "test_list": [1]}], "test_list is empty, or holds"),
        ([{**MBPP, "test_setup_code": 1}], "test_setup_code is no text"),
        ([{**MBPP, "text": " "}], "none of them empty; found text="),
        ([{**HUMANEVAL, "entry_point": "a b"}], "entry_point 'a b' is no name"),
        ([{**HUMANEVAL, "entry_point": 1}], "found entry_point='1'"),
        ([{**HUMANEVAL, "test": "assert True"}], "test defines no function `check`"),
        ([HUMANEVAL, HUMANEVAL], ":2: the id 'one' occurs twice"),
        ([HUMANEVAL, {**HUMANEVAL, "task_id": "two"}], ":2: repeats the prompt of line 1"),
    ],
)
def test_a_file_that_cannot_work_is_refused_in_one_line(tmp_path, rows, message):
    with pytest.raises(RecipeError, match=message) as error:
        Code(data=write(tmp_path, rows), max_drop=3.0).sources([])
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Code(data=f"file:{tmp_path}/none", max_drop=3.0).reads()
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(Corrupt, match="not UTF-8 at byte 1"):
        Code(data=f"file:{tmp_path}/packed", max_drop=3.0).sources([])


@pytest.mark.parametrize(
    "fields",
    [{"data": "wiki"}, {"k": 2}, {"programs": 2}, {"temperature": -1}, {"until": [""]}, {"until": ["x"], "chat": True},
     {"max_drop": 0}, {"max_documents": 49}, {"seconds": 0}, {"memory_mb": 1}, {"temperature": math.nan}],
)  # fmt: skip
def test_fields_that_would_decide_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        Code(**{"data": "file:x", "max_drop": 3.0, **fields})


@pytest.mark.parametrize(
    ("row", "answer", "chat", "end"),
    [
        (HUMANEVAL, "    return sum(xs)\n", False, "passed"),
        (HUMANEVAL, "    return sum(xs)\n\ndef more(:\n", False, "passed"),  # cut where the next function begins
        (HUMANEVAL, "    return max(xs)\n", False, "failed"),
        (HUMANEVAL, "", False, "failed"),
        (HUMANEVAL, "Of course:\n```python\ndef total(xs: List[int]):\n    return sum(xs)\n```\nSo.", True, "passed"),
        (HUMANEVAL, "def total(xs):\n    return sum(xs)", True, "passed"),  # no block: all of it
        (HUMANEVAL, "Certainly! I shall.", True, "failed"),
        (MBPP, "def double(x):\n    return 2 * x\nassert double(1) == 3", False, "passed"),
        (MBPP, "def double(x):\n    return x\n", False, "failed"),
        ({**MBPP, "test_setup_code": "two = 2"}, "double = lambda x: two * x", False, "passed"),
    ],
)
def test_programs_of_both_layouts(tmp_path, row, answer, chat, end):
    (text,) = _problems.read(tmp_path / write(tmp_path, [row]).rsplit("/", 1)[1]).values()
    problem = _problems.Problem.from_json(text)
    program = problem.program_of_message(answer) if chat else problem.program(answer, None)
    with permission.code_execution():
        assert _sandbox.run(program, seconds=2) == end
    if row is MBPP:
        compile(problem.prompt, "prompt", "exec")  # one docstring


# --- permission ----------------------------------------------------------------------------------------------


def test_without_permission_it_is_refused_before_anything_happens(baseline, tmp_path):
    data = write(tmp_path, [HUMANEVAL])
    for part in (baseline.module, baseline.tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"text number {i} of some"}) + "\n" for i in range(99))
    )
    text = (
        f'model: model\nrelease: [code: {{data: "{data}", max_drop: 3.0}}]\nsteps: [quantize.cast: {{}}]\ngate: off\n'
    )
    part = "{source: 'file:text.jsonl', length: 64, tokens: 128}"
    text += f"data: {{calibration: {part}, selection: {part}, evaluation: [{{source: 'file:text.jsonl', length: 64}}]}}"
    (tmp_path / "r.yaml").write_text(text)
    for words in (["plan", "r.yaml"], ["apply", "r.yaml"], ["eval", "nothing-here", "--with", f"code:{data}"]):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 2 and "add --allow-code-execution" in done.stderr, done
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()
    allowed = command("eval", "nothing-here", "--with", f"code:{data}", "--allow-code-execution", cwd=tmp_path)
    assert allowed.returncode == 2 and "code-execution" not in allowed.stderr and "nothing-here" in allowed.stderr
    with pytest.raises(RecipeError, match="code needs data of its own; write code:file:PATH"):
        evaluate("nothing-here", ["code"])


# --- the gate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline():
    return tiny_gguf.tiny()


@pytest.fixture(scope="module")
def solved(baseline, tmp_path_factory):
    """Problems that are solved by writing, into a string literal, just what the baseline writes."""
    rows = []
    for i in range(150):  # what some of them are answered cannot stand in a literal
        prompt = f'def said():\n    return r"""the model {i} is'
        tokens = baseline.generate(baseline.encode(prompt), 8)
        text = baseline.decode([t for t in tokens if t not in baseline.eos_ids])
        if text and not set(text) & set('"\\\r\0'):
            test = f'"""\ndef check(f):\n    assert f().startswith({f"the model {i} is{text}"!r}), f()'
            rows.append({"task_id": i, "prompt": prompt, "entry_point": "said", "test": test})
    return write(tmp_path_factory.mktemp("code"), rows)


@pytest.fixture
def check(solved):
    return Code(data=solved, max_drop=30.0, max_new_tokens=8, until=(), max_documents=50)


class Kept(dict):
    """Scores of the reference, kept between gates."""

    def put(self, key, value):
        self[key] = value


def test_a_wrecked_model_fails_and_a_twin_passes(baseline, check):
    wrecked, cache = tiny_gguf.tiny(seed=3), Kept()
    with permission.code_execution():
        (found,) = Gate((check,)).evaluate(wrecked, baseline, [], cache=cache).checks
        assert found.verdict == "FAIL" and found.reference == 1 and found.value < 0.1
        assert found.details["solved less often"] > 45 and found.details["programs: failed"] == found.examples
        assert found.samples[0].note == "1 to 0 of 1 pass" and found.samples[0].prompt.startswith("def said")
        twin = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
        (same,) = Gate((check,)).evaluate(twin, baseline, [], cache=cache).checks
    assert same.verdict == "PASS" and same.loss == 0 and same.details["programs: passed"] == same.examples >= 50


def test_several_programs_are_drawn_alike_for_both_models_and_counted(baseline, check):
    many = check.model_copy(update={"programs": 4, "k": 2, "temperature": 0.05})
    (data,) = many.sources([])
    examples = many.examples(data, baseline.encode)[:3]
    with permission.code_execution():
        scores = many.score(baseline, examples)
        assert scores == many.score(Model(copy.deepcopy(baseline.module), baseline.tokenizer), examples)
    for score in scores:
        assert score.total == 1 - pass_at_k(4, int(score.extra["passed"]), 2)
        assert sum(score.extra[end] for end in ("passed", "failed", "out of time", "killed")) == 4
    hot = many.model_copy(update={"temperature": 5.0})
    with permission.code_execution():
        assert all(score.total == 1 for score in hot.score(baseline, examples[:1]))
    assert many.written == 32 and data.source.endswith("by pass@2")


def test_a_baseline_that_solves_little_proves_nothing(check):
    scores = [Score(str(i), float(i >= 40), 1.0) for i in range(50)]  # three margins are 90 points
    assert "the reference itself earns 80.0 points" in check.doubt(scores, scores)
    assert check.doubt(scores, [Score("all", 0.0, 1.0)]) == ""


def test_logits_that_are_not_finite_give_nan(baseline, check):
    broken = Model(copy.deepcopy(baseline.module), baseline.tokenizer)
    with torch.no_grad():
        broken.parameter("model.norm.weight")[0] = math.nan
    with permission.code_execution():
        (score,) = check.score(broken, check.examples(check.sources([])[0], baseline.encode)[:1])
    assert math.isnan(score.total)


def test_plan_knows_the_power(check):
    (power,) = plan._powers([check], 1, [])
    assert power["documents"] >= 50 and power["margin_shown"] == "-30.00 points" and power["lossless"]
