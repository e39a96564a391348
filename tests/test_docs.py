"""The listings of docs/ run as they stand: the Python interface, and plug-ins that users install."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import plugin, run, verify
from compress import recipe as recipes
from compress.errors import RecipeError
from compress.store import Store
from export._llama_cpp import find
from tests.tiny import WORDS
from tests.tiny_gguf import tiny

ROOT = Path(__file__).parents[1]


def listings(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a small model, documents and a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESS_HOME", str(tmp_path / "home"))
    model = tiny()
    model.module.save_pretrained("my-model")
    model.tokenizer.save_pretrained("my-model")
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(6, 12)))} for _ in range(600)]
    Path("my-text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_python_interface_does_what_its_page_says(place, capsys):
    names: dict[str, Any] = {}
    blocks = listings("api.md", "python")
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert len(blocks) == 6
    metrics = {m["metric"]: m for m in names["found"]["metrics"]}
    assert metrics.keys() == {"perplexity", "divergence"} and metrics["divergence"]["examples"] == 60
    assert 0 < metrics["divergence"]["value"] < 0.02 and metrics["perplexity"]["against"]["upper"] > 0
    assert names["made"].weights_exact and not names["made"].gated
    assert [c.verdict for c in names["result"].checks] == ["PASS", "PASS"]
    assert names["again"].digest == names["model"].digest  # the run's only step is the one made by hand
    files = [find(place / folder) for folder in ("my-export", "my-second-export")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "perplexity" in capsys.readouterr().out


def test_every_public_name_is_on_the_page():
    text = (ROOT / "docs" / "api.md").read_text()
    assert all(f"compress.{name}" in text for name in compress.__all__)
    assert all(getattr(compress, name) for name in compress.__all__)


# --- plug-ins --------------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, module: str, points: dict[str, dict[str, str]]) -> None:
    """An installed distribution, as an installer leaves it: a module and its dist-info."""
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points.items())
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder on sys.path, for distributions; what was found in it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    caches = (plugin.names, plugin._third_party)
    for cached in caches:
        cached.cache_clear()
    yield folder
    for cached in caches:
        cached.cache_clear()
    for name in ("mine", "broken", "other"):
        sys.modules.pop(name, None)


@pytest.fixture
def mine(site) -> Path:
    """The plug-ins of docs/extending.md, installed."""
    (table,) = listings("extending.md", "toml")
    points = tomllib.loads(table)["project"]["entry-points"]
    distribution(site, "mine", "\n".join(listings("extending.md", "python")), points)
    return site


def ls(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", "from compress.cli import main; main()", "ls", *options]
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, cwd=site
    )


def test_installed_plug_ins_are_listed(mine):
    found = json.loads(ls(mine, "--json").stdout)
    assert found["steps"]["mine.clip"].startswith("Clip the weights")
    assert "disagreement" in found["evaluators"] and "plain" in found["exporters"]
    assert "quantize.rtn" in found["steps"]
    assert {"mine.clip", "disagreement", "plain"} <= set(re.findall(r"[\w.]+", json.dumps(recipes.schema())))


def test_a_recipe_runs_with_an_installed_step_evaluator_and_exporter(place, mine):
    (steps,) = listings("extending.md", "yaml")
    data = '{source: "file:my-text.jsonl", length: 64, tokens: 512}'
    recipe = recipes.load(
        f"model: my-model\ndata:\n  calibration: {data}\n  selection: {data}\n"
        '  evaluation: [{source: "file:my-text.jsonl", length: 64}]\n'
        f"release: [disagreement: {{max_share: 0.3}}, divergence: {{max_mean: 1.0}}]\n{steps}"
    )
    record, folder = run.apply(recipe, place / "run", Store(place / "home"))
    assert record.status == "passed", record
    (step,) = record.steps
    (check,) = step.gate.checks
    assert step.notes == ["clipped 14 linears at 3.0 standard deviations"] and step.name == "mine.clip"
    assert (check.metric, check.verdict) == ("disagreement", "PASS") and 0 < check.loss < 0.3 and check.examples >= 50
    parity = {"decode", "parity", "parity_max", "parity_tokens"}
    assert {c.metric for c in record.exports[0].gate.checks} == {"disagreement", "divergence", *parity}
    assert verify.verify(folder)
    reopened = compress.load(str(folder / "artifacts" / "plain"))
    assert reopened.digest == compress.load(folder).digest != compress.load("my-model").digest


def test_an_installed_step_is_judged_before_weights_load(place, mine):
    release = "release: [perplexity: {max_increase: 5%}]\ngate: off\n"
    with pytest.raises(RecipeError, match=r"recipe.yaml:4:33  steps\[0\] mine.clip.deviations: found -1"):
        recipes.load(f"model: my-model\n{release}steps: [mine.clip: {{deviations: -1}}]")
    recipe = recipes.load(f"model: my-model\n{release}steps: [mine.clip: {{layers: nowhere}}]")
    with pytest.raises(RecipeError, match="'nowhere' matches no linear"):
        run.apply(recipe, place / "run", Store(place / "home"))
    with pytest.raises(RecipeError, match="unknown step 'mine.clop'; did you mean mine.clip"):
        plugin.step("mine.clop")


@pytest.mark.parametrize(
    "module,point,message",
    [
        ("import nothing_of_this_name", "broken:X", "cannot be imported: ModuleNotFoundError"),
        ("X = 1", "broken:Y", "cannot be imported: AttributeError"),
        ("X = 1", "broken:X", "is no subclass of compress.interfaces.Step"),
        ("X = 1", "broken", "is no subclass of compress.interfaces.Step"),
        ("from compress.interfaces import Step\nclass X(Step):\n  name = 'y'", "broken:X", "name = 'y', expected"),
        ("from compress.interfaces import Step\nclass X(Step):\n  name = 'x'", "broken:X", "does not define apply"),
    ],
)
def test_a_plug_in_that_cannot_work_says_why(site, module, point, message):
    distribution(site, "broken", module, {"compress.steps": {"x": point}})
    with pytest.raises(RecipeError, match=message) as caught:
        plugin.step("x")
    assert "step 'x' of broken (broken" in str(caught.value) and "\n" not in str(caught.value)
    assert plugin.summary("step", "x") == f"cannot be used: {caught.value}"


def test_an_evaluator_without_its_unit_says_so(site):
    text = "from compress.interfaces import Evaluator\nclass X(Evaluator):\n  name = 'x'\n"
    text += "  @property\n  def margin(self):\n    return 1.0\n"
    distribution(site, "broken", text, {"compress.evaluators": {"x": "broken:X"}})
    with pytest.raises(RecipeError, match="does not define unit, definition"):
        plugin.evaluator("x")


def test_nobody_replaces_a_name_in_silence(mine):
    source = "from mine import Clip as X\n"
    distribution(mine, "other", source, {"compress.steps": {"mine.clip": "other:X", "quantize.rtn": "other:X"}})
    with pytest.raises(RecipeError, match=r"offered by .*\(other:X\)"):
        plugin.step("mine.clip")
    with pytest.raises(RecipeError, match=r"'quantize.rtn' is offered by compress and by other \(other:X\)"):
        plugin.step("quantize.rtn")
    done = ls(mine)
    assert done.returncode == 0 and "cannot be used: step 'quantize.rtn' is offered by" in done.stdout
