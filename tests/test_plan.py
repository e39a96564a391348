import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress import artifact, plan
from compress.cli import _plan_lines
from compress.decisions import minimum_detectable
from compress.interfaces import Context
from compress.plugin import step
from compress.recipe import load
from compress.recipe_data import requests
from compress.scarcity import scarcity
from tests.recipes import CONFIG, HEAD, SMOL, recipe, refusal
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 documents of 90 characters, about 20 tokens, as a recipe's source."""
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:09} " * 9}) + "\n" for i in range(300)))
    return f"file:{path}"


def described(steps: str, **options: Any) -> dict[str, Any]:
    found = plan.describe(recipe(steps, **options), SMOL)
    json.dumps(found, allow_nan=False)
    return found


def test_sizes_count_scales_and_embeddings() -> None:
    found = described("  - quantize.rtn: {encoding: int4, group_size: 32, embeddings: int8}\n")
    linears, embedding, norms = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536), 49152 * 576, 61 * 576
    assert found["parameters"] == linears + embedding == 134_479_872
    assert found["baseline"] == {"size_bytes": 4 * (linears + embedding + norms), "bits_per_weight": 32.0}
    step = found["steps"][0]
    assert step["size_bytes"] == (linears * 4.5 + embedding * 8.5 + norms * 32) / 8
    assert step["bits_per_weight"] == pytest.approx(step["size_bytes"] * 8 / (linears + embedding + norms))


def test_sizes_follow_the_steps_and_every_alternative() -> None:
    found = described(
        "  - prune.wanda: {sparsity: 0.2}\n"
        "  - quantize.gptq: {encoding: int4}\n"
        "    otherwise:\n      - quantize.gptq: {encoding: int8}\n      - quantize.cast: {}\n"
    )
    first, second = found["steps"]
    masks = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536) // 8
    assert first["size_bytes"] == found["baseline"]["size_bytes"] + masks and first["bits_per_weight"] == 32
    (alone,) = described("  - quantize.gptq: {encoding: int4}\n")["steps"]
    assert second["size_bytes"] == alone["size_bytes"] + masks
    assert [alternative["name"] for alternative in second["otherwise"]] == ["quantize.gptq", "quantize.cast"]
    bits = [second["bits_per_weight"], *(a["bits_per_weight"] for a in second["otherwise"])]
    assert bits == pytest.approx([4.5 + 4 * 49152 * 576 / 134_479_872, 8.5, 16], rel=2e-3)


def test_the_size_foretold_is_that_of_the_artifact_masks_and_all(tmp_path: Path) -> None:
    steps = (
        '  - prune.magnitude: {sparsity: 0.3, layers: {"*.o_proj": 0, "*.down_proj": "2:4"}}\n'
        '  - prune.magnitude: {sparsity: 0, layers: {"*.0.*.o_proj": 0.5}}\n'
        "  - quantize.rtn: {encoding: int8, group_size: 16}\n"
    )
    model, chosen = tiny_model(), recipe(steps, HEAD.replace("pydoc", "pydoc, length: 64"))
    foretold = plan.describe(chosen, model.facts)["steps"]
    for i, entry in enumerate(chosen.steps):
        entry.step.apply(model, Context(seed=0))
        artifact.save(model, tmp_path / str(i))
        (file,) = (tmp_path / str(i)).glob("*.safetensors")
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        made = artifact.manifest(tmp_path / str(i))
        assert made["size_bytes"] - header == foretold[i]["size_bytes"]
        assert made["bits_per_weight"] == pytest.approx(foretold[i]["bits_per_weight"], rel=1e-12)
    sizes = [step["size_bytes"] for step in foretold]
    assert sizes[1] - sizes[0] == 32 * 32 // 8 and foretold[1]["bits_per_weight"] == 32


def test_sizes_follow_the_shapes() -> None:
    found = described(
        "  - prune.neurons: {fraction: 0.25}\n    otherwise:\n      - prune.layers: {count: 3}\n"
        "  - quantize.rtn: {encoding: int8, embeddings: null}\n"
    )
    attention, mlp, norms, embedding = 2 * 576 * 576 + 2 * 192 * 576, 3 * 576 * 1536, 2 * 576, 49152 * 576 + 576
    narrow, coded = found["steps"]
    assert narrow["size_bytes"] == 4 * (30 * (attention + 0.75 * mlp + norms) + embedding)
    assert narrow["otherwise"][0]["size_bytes"] == 4 * (27 * (attention + mlp + norms) + embedding)
    assert coded["size_bytes"] == (30 * (8.5 * (attention + 0.75 * mlp) + 32 * norms) + 32 * embedding) / 8


def test_estimates_grow_with_the_tokens_that_a_step_reads() -> None:
    short = described("  - quantize.gptq: {}\n")["steps"][0]
    head = HEAD.replace("tokens: 4096", "tokens: 8192")
    long = described("  - quantize.gptq: {}\n", head=head)["steps"][0]
    assert long["seconds_estimate"] == pytest.approx(2 * short["seconds_estimate"])
    assert described("  - quantize.rtn: {}\n")["steps"][0]["seconds_estimate"] == 0
    train = described("  - distill.logits: {tokens: 4096}\n")["steps"][0]
    assert train["seconds_estimate"] == pytest.approx(4 / 3 * short["seconds_estimate"])
    assert train["memory_bytes_estimate"] > short["memory_bytes_estimate"] > 8 * SMOL.parameters


def test_power_is_what_the_gate_computes_and_the_attempts_share_alpha(documents: str) -> None:
    head = HEAD.replace("evaluation: [{source: pydoc}]", f"evaluation: [{{source: '{documents}'}}]")
    one = described("  - quantize.rtn: {}\n", head=head)["steps"][0]["checks"][0]
    steps = "  - quantize.gptq: {}\n    otherwise:\n      - quantize.rtn: {}\n      - quantize.cast: {}\n"
    three = described(steps, head=head)["steps"][0]["checks"][0]
    check = recipe("  - quantize.rtn: {}\n").gate[0]
    sd = plan.PLANNING_SD["perplexity"]
    assert one["resolves"] == minimum_detectable(check, one["documents"], sd)
    assert three["resolves"] == minimum_detectable(check, one["documents"], sd, attempts=3) > one["resolves"]
    assert (one["source"], one["documents"], one["margin"]) == (documents, 300, math.log1p(0.05))
    limited = head.replace("5%", "5%, max_documents: 60")
    assert described("  - quantize.rtn: {}\n", head=limited)["steps"][0]["checks"][0]["documents"] == 60


def test_a_margin_below_what_its_documents_resolve_is_warned_of(documents: str) -> None:
    head = HEAD.replace("evaluation: [{source: pydoc}]", f"evaluation: [{{source: '{documents}'}}]")
    head = head.replace("gate: [{perplexity: {max_increase: 5%}}]", "gate: [{perplexity: {max_increase: 0.1%}}]")
    warnings = described("  - quantize.rtn: {}\n", head=head.replace("5%", "90%"))["warnings"]
    assert [w.split(",")[0] for w in warnings] == [f"steps[0] quantize.rtn: perplexity on {documents}"]
    assert "at 80 % power, more than its margin of +0.1 %" in warnings[0]


def test_too_few_documents_are_warned_of() -> None:
    found = described("  - quantize.rtn: {}\n")  # half of pydoc's 79 topics
    assert [w.split(":")[0] for w in found["warnings"]] == ["steps[0] quantize.rtn", "release"]
    assert all(w.endswith("at least 50 are needed, so it can only end inconclusive") for w in found["warnings"])
    assert found["steps"][0]["checks"][0]["resolves"] is None


def test_the_plan_says_with_how_many_clusters_accuracy_is_proven(documents: str) -> None:
    head = HEAD.replace("release: [", "release: [{accuracy: {max_drop: 3.0, tasks: [cloze, minimal_pairs]}}, ")
    head = head.replace("evaluation: [{source: pydoc}]", f"evaluation: [{{source: '{documents}'}}]")
    found = described("  - quantize.rtn: {}\n", head=head)
    cloze, pairs = found["release"][:2]
    assert (cloze["source"], pairs["source"]) == (f"cloze: {documents}", "minimal_pairs")
    assert cloze["documents"] < pairs["documents"] == 2000 == found["release"][1]["documents"]
    check = load(head + "steps: [quantize.rtn: {}]").release[0]
    sd = plan.PLANNING_SD["accuracy"]
    assert pairs["resolves"] == minimum_detectable(check, 2000, sd) < 0.03
    n = pairs["lossless"]
    assert minimum_detectable(check, n, sd) <= 0.03 < minimum_detectable(check, n - 1, sd)
    assert 1000 < n < 2000 and pairs["margin_shown"] == "-3.00 points"  # about 2,000 were expected
    tighter = described("  - quantize.rtn: {}\n", head=head.replace("max_drop: 3.0", "max_drop: 1.0"))
    assert tighter["release"][1]["lossless"] > 10_000
    assert any("accuracy on minimal_pairs, 2000 documents: resolves" in w for w in tighter["warnings"])


def test_gates_with_accuracy_take_longer(documents: str) -> None:
    head = HEAD.replace("evaluation: [{source: pydoc}]", f"evaluation: [{{source: '{documents}'}}]")
    plain = described("  - quantize.rtn: {}\n", head=head)["steps"][0]["gate_seconds_estimate"]
    more = head.replace("gate: [", "gate: [{accuracy: {max_drop: 3.0, tasks: [minimal_pairs]}}, ")
    assert described("  - quantize.rtn: {}\n", head=more)["steps"][0]["gate_seconds_estimate"] > plain > 0


def test_exact_checks_resolve_everything() -> None:
    head = HEAD.replace("release: [", "release: [{footprint: {max_mb: 90}}, ")
    release = described("  - quantize.rtn: {}\n", head=head)["release"]
    assert (release[0]["source"], release[0]["resolves"]) == ("files", 0.0)


FIXED = "{generation: {max_collapsed: 10%, prompts: 8}}, {long_context: {max_increase: 15%}}"


def test_fixed_sets_resolve_everything_and_are_printed_as_such() -> None:
    found = described("  - quantize.rtn: {}\n", head=HEAD.replace("release: [", f"release: [{FIXED}, "))
    generation, long = found["release"][:2]
    assert (generation["source"], generation["documents"], generation["resolves"]) == ("built-in prompts", 8, 0.0)
    assert (long["source"], long["documents"], long["resolves"]) == ("pydoc", 1, 0.0)
    assert not any("generation" in w or "long_context" in w for w in found["warnings"])
    lines = _plan_lines(found)
    told = "decided on a fixed set, without sampling error"
    assert f"  generation on built-in prompts: margin +10.00 points, {told}" in lines
    assert f"  long_context on pydoc: margin +15.0 %, {told}" in lines


def test_a_gate_that_generates_takes_longer_and_a_long_window_more_memory() -> None:
    plain = described("  - quantize.rtn: {}\n")["steps"][0]
    fixed = described("  - quantize.rtn: {}\n", head=HEAD.replace("\ngate: [", f"\ngate: [{FIXED}, "))["steps"][0]
    writing = 2 * 8 * 48 * 4 * SMOL.parameters / plan.BANDWIDTH
    assert fixed["gate_seconds_estimate"] > plain["gate_seconds_estimate"] + writing > writing > 10
    assert fixed["memory_bytes_estimate"] - plain["memory_bytes_estimate"] == 4 * (2048 - 2 * 512) * SMOL.vocabulary


@pytest.mark.parametrize("where", ["release: [", "\ngate: ["])
def test_a_window_beyond_the_context_is_refused(where: str) -> None:
    head = HEAD.replace(where, f"{where}{{long_context: {{max_increase: 15%, length: 8193}}}}, ")
    message = refusal(recipe("  - quantize.rtn: {}\n", head))
    assert "long_context: windows of 8193 tokens exceed the model's context of 8192 tokens" in message
    assert message.startswith("recipe.yaml:") and ("release" in message) == (where == "release: [")


def test_the_plan_reads_no_weights_and_needs_no_torch() -> None:
    code = (
        "import sys, json; from compress import plan; from compress.recipe import load\n"
        "from compress.architectures import Facts\n"
        f"config, text = {CONFIG!r}, {HEAD + 'steps: [quantize.rtn: {}]'!r}\n"
        "plan.describe(load(text), Facts.from_config(config))\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'gguf') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_type_that_the_processor_has_not_is_warned_of(dtype, working):
    warned = (dtype, str(working)) == ("bfloat16", "torch.float32")
    found = described("  - quantize.rtn: {}\n", head=HEAD + f"dtype: {dtype}\n")["warnings"]
    assert ["dtype: this processor multiplies no bfloat16" in w for w in found].count(True) == warned


def test_fewer_calibration_tokens_than_channels_are_warned_of_with_both_numbers() -> None:
    def scarce(steps: str, tokens: int) -> list[str]:
        head = HEAD.replace("tokens: 4096", f"tokens: {tokens}")
        return [w for w in described(steps, head=head)["warnings"] if "calibration tokens" in w]

    (warning,) = scarce("  - quantize.gptq: {}\n    otherwise:\n      - quantize.rtn: {}\n", 1024)
    assert warning == (
        "steps[0] quantize.gptq: about 1,024 calibration tokens for 1,536 input channels of "
        "model.layers.0.mlp.down_proj: its Hessian is singular, and weights are fitted to these few texts, which may "
        "serve no other; give "
        "data.calibration at least 1,536 tokens, better ten times as many"
    )
    assert not scarce("  - quantize.gptq: {}\n", 1536)
    solving = (
        "quantize.awq: {}",
        "quantize.mixed: {}",
        "prune.sparsegpt: {sparsity: 0.1}",
        "prune.neurons: {fraction: 0.2}",
    )
    assert [len(scarce(f"  - {step}\n", 1024)) for step in solving] == [1] * 4
    others = ("quantize.smoothquant: {}", "quantize.mixed: {method: rtn}", "prune.wanda: {sparsity: 0.1}")
    narrow = ("prune.heads: {groups: 1}", "prune.hidden: {fraction: 0.1}")  # 576 input channels
    assert [len(scarce(f"  - {step}\n", 1024)) for step in (*others, *narrow)] == [0] * 5
    assert [len(scarce(f"  - {step}\n", 512)) for step in narrow] == [1] * 2


def test_the_plan_counts_the_states_of_the_calibration_and_the_hessians_held_at_once() -> None:
    def memory(step: str, tokens: float) -> int:
        r = recipe(f"  - {step}\n")
        return plan._memory_bytes(r, SMOL, r.steps[0], tokens)

    many, stream = 2**25, "prune.neurons: {fraction: 0.25, random_tokens: 0, update: stream}"
    copies = {
        step: (memory(step, 2 * many) - memory(step, many)) / (4 * 576 * many)
        for step in (
            "quantize.rtn: {}",
            "quantize.awq: {}",
            stream,
            "quantize.gptq: {}",
            "distill.logits: {tokens: 64}",
        )
    }
    # gptq: states twice, inputs of the output projection, and of the MLP's last linear, which are 8/3 as wide
    assert list(copies.values()) == pytest.approx([0, 3.3, 6.6, 1.1 * (3 + 8 / 3), 0])
    assert memory("quantize.gptq: {}", many) > memory("quantize.gptq: {error_propagation: 0}", many) > 77e9
    logits = 4 * 1024 * SMOL.vocabulary
    wide = replace(SMOL, sizes={**SMOL.sizes, "mlp": 15360})
    held = {
        step: plan._memory_bytes(r, wide, r.steps[0]) - (600_000_000 + 8 * wide.parameters)
        for step in ("quantize.gptq", "quantize.awq", "quantize.smoothquant", "quantize.rtn")
        for r in [recipe(f"  - {step}: {{}}\n")]
    }
    assert list(held.values()) == [4 * 5 * 15360**2, 4 * (5 * 15360**2 + 3 * 576**2), 4 * 2 * 15360**2, logits]


def test_the_plan_counts_what_gradients_take() -> None:
    recipes = {c: recipe(f"  - prune.neurons: {{fraction: 0.25, criterion: {c}}}\n") for c in ("fisher", "activation")}
    found, plain = (plan._memory_bytes(r, SMOL, r.steps[0]) for r in recipes.values())
    # 49 kB per token and block, three rows of logits, half of the weights, G of every block; longest: a window
    longest = max(request.length for request in requests(recipes["fisher"]))
    left = longest * (30 * 4 * (8 * 576 + 5 * 1536) + 3 * 4 * 49152) + 2 * SMOL.parameters + 30 * 4 * 576**2
    assert found - plain == left
    calibration = [plan.Text("calibration", "wiki", 1, 1_000.0)]
    seconds = [plan._step_seconds(r.steps[0].step, SMOL, calibration) for r in recipes.values()]
    assert seconds[0] == 2 * seconds[1] > 0
    mixed, gptq = (recipe(f"  - quantize.{name}: {{}}\n") for name in ("mixed", "gptq"))
    more = plan._memory_bytes(mixed, SMOL, mixed.steps[0]) - plan._memory_bytes(gptq, SMOL, gptq.steps[0])
    assert more == left - 30 * 4 * 576**2 + 4 * sum(n * m for n, m in SMOL.linears.values())


@pytest.mark.parametrize(
    "name,fields,reader",
    [
        ("quantize.gptq", {}, "mlp.down_proj"),
        ("quantize.gptq", {"layers": ["*.k_proj"]}, "self_attn.q_proj"),  # they share their input
        ("quantize.gptq", {"keep": {"*.down_proj": "fp32", "*.mlp.*": "fp32"}}, "self_attn.q_proj"),
        ("quantize.awq", {"layers": ["*.up_proj"]}, "mlp.gate_proj"),
        ("prune.sparsegpt", {"sparsity": 0.5, "layers": {"*.down_proj": 0.0}}, "self_attn.q_proj"),
        ("prune.neurons", {"fraction": 0.25}, "mlp.down_proj"),
        ("prune.neurons", {"fraction": 0.0}, None),
        ("prune.layers", {"count": 0, "update": "stream"}, None),
        ("prune.hidden", {"fraction": 0.1, "update": False}, None),
    ],
)
def test_what_is_scarce_is_told_of_what_the_step_solves(name, fields, reader):
    chosen = step(name)(**fields)
    said = scarcity(chosen, SMOL, 400)
    assert (f"input channels of model.layers.0.{reader}: " in said) if reader else said == ""
    enough = 1536 if reader == "mlp.down_proj" else 576
    share = 1 + getattr(chosen, "random_tokens", 0)
    assert scarcity(chosen, SMOL, enough / share) == ""
    assert bool(scarcity(chosen, SMOL, (enough - 1) / share)) == (reader is not None)
